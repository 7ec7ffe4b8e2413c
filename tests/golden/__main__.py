"""Write all golden code anew: `python -m tests.golden` from the repository's root."""

from . import EXAMPLE, EXAMPLE_OF, FOLDER, NAMES, generate, path


def main() -> None:
    for old in FOLDER.glob("*.cpp"):
        old.unlink()
    for name in NAMES:
        path(name).write_text(generate(name), encoding="utf-8")
    EXAMPLE.write_text(generate(EXAMPLE_OF), encoding="utf-8")
    print(f"{len(NAMES)} files in {FOLDER}, and {EXAMPLE}")


if __name__ == "__main__":
    main()
