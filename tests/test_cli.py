"""The command `fusedopt`, also as `python -m fusedopt`: what doctor and cache print, and their exit status."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import fusedopt
from fusedopt import __main__, doctor
from fusedopt.compile import cache, toolchain
from fusedopt.extension import leaf

HAS_COMPILER = any(shutil.which(name) for name in toolchain.CANDIDATES)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    for name in ("CXX", "FUSEDOPT_BACKEND", "FUSEDOPT_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_opened", {})
    monkeypatch.setattr(cache, "_warned", set())
    return tmp_path / "cache"


def run_json(capsys):
    status = __main__.main(["doctor", "--json"])
    return status, json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------- doctor


@needs_compiler
def test_doctor_where_all_is_well(capsys, root):
    status, found = run_json(capsys)
    assert status == 0
    assert found["works"]
    assert found["versions"]["torch"].startswith(tuple("0123456789"))
    assert found["compiler"]["works"]
    assert found["cpu"]["threads"] >= 1
    assert (found["cache"]["folder"], found["cache"]["usable"]) == (str(root), True)
    assert isinstance(found["gpus"], list)
    assert found["extension"]["reason"]
    assert list(found["backends"]) == ["cpp", "cuda", "triton", "reference"]
    for name in ("cpp", "reference"):
        assert found["backends"][name]["works"], found["backends"][name]
    assert "3 steps of Adam agree with the reference" in found["backends"]["cpp"]["reason"]


@needs_compiler
def test_doctor_for_people(capsys, root):
    assert __main__.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in ("versions", "compiler", "CPU", "GPUs", "extension", "backends", "next", f"{root}: usable"):
        assert part in out
    assert re.search(r"cpp +works: 3 steps of Adam", out)
    assert max(map(len, out.splitlines())) < 200


def test_doctor_says_plainly_what_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda = doctor.check_backend("cuda")
    assert not cuda.works and cuda.reason and cuda.remedy
    assert doctor.check_backend("triton").reason == "torch finds no GPU"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "fusedopt[triton]" in doctor.check_backend("triton").remedy


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [("CXX", "no-such-compiler", "cpp: correct or unset CXX"), ("PATH", "", "cpp: install g++")],
)
def test_doctor_without_a_compiler(capsys, monkeypatch, variable, value, remedy):
    monkeypatch.setenv(variable, value)
    status, found = run_json(capsys)
    assert status == 1
    assert not found["works"]
    assert ": not found" in found["backends"]["cpp"]["reason"]
    assert found["backends"]["reference"]["works"]
    assert any(text.startswith(remedy) for text in found["next"])
    assert __main__.main(["doctor"]) == 1
    assert remedy in capsys.readouterr().out
    assert [text.count("Remedy") for text in found["next"]] == [0] * len(found["next"])
    assert not any(text.startswith("cuda") and "extension" in text for text in found["next"])


@needs_compiler
@pytest.mark.skipif(os.name != "posix", reason="mode bits")
def test_doctor_with_an_unsafe_cache(capsys, root):
    root.mkdir()
    root.chmod(0o777)
    _, found = run_json(capsys)  # it is in the report, so there is no warning
    assert not found["cache"]["usable"]
    assert f"cache: run `chmod 700 {root}`" in "\n".join(found["next"])
    assert "a temporary folder is used" in doctor.render(found)


def test_doctor_has_a_missing_extension_built_and_waits(caplog, monkeypatch):
    asked = []
    monkeypatch.setattr(leaf, "native", None)
    monkeypatch.setattr(leaf, "seek", lambda wait: asked.append(wait))
    monkeypatch.setattr(leaf, "extension_status", lambda: (not asked, "for a reason"))
    assert doctor._extension() == doctor.Status(False, "for a reason")
    assert asked == [True]
    assert "building it" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("FUSEDOPT_BACKEND", "metal", "FUSEDOPT_BACKEND='metal' is no backend"),
        ("FUSEDOPT_DEBUG", "7", "FUSEDOPT_DEBUG='7': expected 0, 1"),
    ],
)
def test_doctor_with_wrong_variables(name, value, text, capsys, monkeypatch):
    monkeypatch.setenv(name, value)
    _, found = run_json(capsys)
    assert found["environment"]["set"][name] == value
    assert text in found["next"][0] and not any(doctor.DEFECT in line for line in found["next"])


def test_a_folder_whose_name_the_terminal_lacks_letters_for(monkeypatch, tmp_path):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path / "größe"))
    assert __main__.main(["cache", "show"]) == 0
    assert rb"gr\xf6\xdfe" in terminal.buffer.getvalue()


def test_a_broken_part_is_a_line_of_the_report(monkeypatch):
    def broken():
        raise ZeroDivisionError("oh")

    monkeypatch.setitem(doctor.PROBES, "cpp", broken)
    status = doctor.check_backend("cpp")
    assert not status.works
    assert re.fullmatch(r"ZeroDivisionError: oh \(test_cli\.py:\d+\)", status.reason)


def wrong_by(monkeypatch, error=0.0, used="cpp", eager=()):
    """The self-test of a backend whose results are off by `error`."""
    ones = torch.ones(3)

    def train(name, device, dtype="float32"):
        return ([ones + error], used, list(eager)) if name == "cpp" else ([ones], "reference", [])

    monkeypatch.setattr(doctor, "_train", train)
    return doctor.self_test("cpp")


def test_the_self_test_can_fail(monkeypatch):
    assert wrong_by(monkeypatch, 0.0).works
    assert wrong_by(monkeypatch, 2.0**-22).works  # 2 ulp
    wrong = wrong_by(monkeypatch, 2.0**-21)
    assert (wrong.works, "differ from the reference by 4.8e-07" in wrong.reason) == (False, True)
    assert not wrong_by(monkeypatch, float("nan")).works
    assert "fell back to reference" in wrong_by(monkeypatch, used="reference").reason
    assert "adam_step" in wrong_by(monkeypatch, eager=["adam_step"]).reason


@needs_compiler
def test_the_self_test_notices_a_wrong_kernel(monkeypatch):
    """Weight decay dropped from one side only: 1e-4 of each parameter and step."""
    from fusedopt import callbacks

    train = doctor._train

    def without_decay(name, device, dtype="float32"):
        with monkeypatch.context() as patch:
            if name == "cpp":
                patch.setattr(callbacks, "weight_decay", callbacks.step_stat)
            return train(name, device, dtype)

    assert doctor.self_test("cpp").works
    monkeypatch.setattr(doctor, "_train", without_decay)
    assert "differ from the reference" in doctor.self_test("cpp").reason


# ---------------------------------------------------------------- cache


def fill():
    key = "0123456789abcdef" * 4
    return cache.load_or_build("lion", key, "x", "so", lambda source, out: str(out.write_bytes(b"code")))


def test_cache_show_and_clear(capsys, root):
    fill()
    assert __main__.main(["cache", "show"]) == 0
    assert "lion_0123456789abcdef0123" in capsys.readouterr().out
    assert __main__.main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"{root}: 1 kernels removed\n"
    assert list(root.iterdir()) == []
    assert __main__.main(["cache", "show"]) == 0
    assert "0 kernels" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["cache"], ["cache", "burn"], ["doctor", "--yaml"]])
def test_wrong_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        __main__.main(arguments)
    assert caught.value.code == 2
    assert re.match(r"usage: .*fusedopt .*-h", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("program", "name"), [("/bin/fusedopt", "fusedopt"), ("__main__.py", "python -m fusedopt")]
)
def test_help_names_the_command_as_it_was_called(capsys, monkeypatch, program, name):
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as caught:
        __main__.main(["--help"])
    assert caught.value.code == 0
    assert f"usage: {name} " in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        __main__.main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"fusedopt {fusedopt.__version__}\n")
    assert doctor.report()["versions"]["fusedopt"] == fusedopt.__version__


@pytest.mark.skipif(os.name != "posix", reason="pipes that break")
def test_a_reader_that_stops_reading_is_no_error(root):
    fill()
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fusedopt", "cache", "show"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_as_a_program(root):
    fill()
    done = subprocess.run([sys.executable, "-m", "fusedopt", "cache", "show"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{root}: 1 kernels")
