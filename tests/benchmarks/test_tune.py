"""Variants of what kernels are made with, as far as that goes without a GPU."""

import pytest

from benchmarks.gpu import tune
from benchmarks.gpu.device import Rehearsal
from fusedopt.backends import chunking
from fusedopt.backends.cpp import backend as cpp
from fusedopt.backends.cuda import backend as cuda
from fusedopt.backends.cuda import nvrtc
from fusedopt.backends.triton import backend as triton
from fusedopt.compile import BuildError
from fusedopt.kernels import source


def test_every_variant_of_the_skeleton_compiles():
    try:
        nvrtc.nvrtc()
    except BuildError as error:
        pytest.skip(str(error))
    text = source("cuda.cu").replace('#include "cuda_example.inc"', source("cuda_example.inc"))
    texts = {tune.source(variant, text) for variant in tune.VARIANTS}
    assert len(texts) > 2 and all("#include" not in each for each in texts)
    for each in texts:
        nvrtc.compile_cubin("variant", each, "sm_90")


def test_a_constant_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="no constant 'in_fligth'"):
        tune.source(tune.of("cuda", in_fligth=4), source("cuda.cu"))


def test_variants_are_in_force_within_their_block_alone():
    before = cuda.THREADS, chunking.TILE, cuda.skeleton
    with tune.applied(tune.of("cuda", "stores streamed", threads=64, tile=128, in_flight=2)):
        assert (cuda.THREADS, chunking.TILE) == (64, 128)
        assert "in_flight = 2;" in cuda.skeleton("cuda.cu") and ".cs.v4" in cuda.skeleton("cuda.cu")
    assert (cuda.THREADS, chunking.TILE, cuda.skeleton) == before


def test_every_variant_has_kernels_of_its_own(monkeypatch):
    compiled = []

    def _compile(self, program, *given):
        compiled.append(chunking.TILE)
        return build(self, program, *given)

    build = cpp.Cpp._compile
    monkeypatch.setattr(cpp.Cpp, "_compile", _compile)
    tune.race(
        Rehearsal(), "resnet-50", "AdamW", (tune.of("cpp"), tune.of("cpp", tile=128), tune.of("cpp", tile=64))
    )
    assert compiled == [chunking.TILE, 128, 64]


def test_samples_are_taken_with_the_variants_constants(monkeypatch):
    """Triton asks for them when it launches."""
    seen = []

    def take(self):
        seen.append((chunking.TILE, triton.BLOCK))
        self.samples.append(1.0)

    monkeypatch.setattr(tune.Clock, "take", take)
    before = chunking.TILE, triton.BLOCK
    tune.race(Rehearsal(), "resnet-50", "AdamW", (tune.of("cpp", block=512), tune.of("cpp", tile=128)))
    assert set(seen) == {(before[0], 512), (128, before[1])} and before == (chunking.TILE, triton.BLOCK)


def test_a_table_of_those_that_work(capsys):
    """On the CPU, where a backend that is not there is told and left out."""
    said = tune.table(Rehearsal(), (tune.of("cpp"), tune.of("cpp", tile=128), tune.of("nothing")))
    rows = [line.split("|")[1:-1] for line in said.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["cpp, as it is", "cpp, tile 128", "nothing, as it is"]
    assert all("(1.000)" in cell for cell in rows[0][1:]) and all("(" in cell for cell in rows[1][1:])
    assert not any(cell.strip() for cell in rows[2][1:])
    assert "nothing, as it is: resnet-50, AdamW: KeyError" in capsys.readouterr().out
