"""Where the packaged files are: next to the package in an installed wheel, next to its parent in a checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def config_dir() -> Path:
    """The directory of the yaml files."""
    return _find("configs")


def asset_dir(name: str) -> Path:
    """`assets/<name>`: the embedded teacher, the judge."""
    return _find("assets") / name


def _find(folder: str) -> Path:
    installed = _PACKAGE / folder
    return installed if installed.is_dir() else _PACKAGE.parent / folder
