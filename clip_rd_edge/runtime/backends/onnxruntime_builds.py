"""Import ONNX Runtime, of which only one build may be installed: on PyPI they differ by name, and share one folder."""

from __future__ import annotations

from typing import Any, NamedTuple

from clip_rd_edge.errors import ClipRdEdgeError, in_one_line
from clip_rd_edge.installation import pip
from clip_rd_edge.utils.files import machine_failure
from clip_rd_edge.utils.host import ONNXRUNTIMES, installed_versions

_WITH_NUMPY_2 = (1, 19)  # the first version that runs with it


def import_onnxruntime() -> Any:
    """Return the module `onnxruntime`."""
    try:
        import onnxruntime as ort
        from onnxruntime import InferenceSession  # noqa: F401 — a folder that lost its files is imported, too
    except Exception as error:
        raise machine_failure(error) or _cannot_be_imported(error) from error
    return ort


class Overlap(NamedTuple):
    """Several builds in one folder.

    Attributes:
        build: the one that is wanted, such as `onnxruntime-gpu`.
        fault: what is wrong, without a full stop.
        remedy: the command that leaves only `build`.
    """

    build: str
    fault: str
    remedy: str


def overlapping_builds() -> Overlap | None:
    """Return what is wrong if several builds are installed."""
    versions = installed_versions(ONNXRUNTIMES)
    if len(versions) < 2:
        return None
    # The plain one is a requirement of this package, and comes with it; another was wanted.
    build = next(name for name in versions if name != ONNXRUNTIMES[0])
    others = " ".join(name for name in versions if name != build)
    return Overlap(
        build,
        f"{' and '.join(versions)} are installed in one folder, where each overwrites files of the other",
        f"{pip('uninstall')} -y {others} && {_reinstall(build, versions[build])}",
    )


def _cannot_be_imported(error: Exception) -> ClipRdEdgeError:
    versions = installed_versions(ONNXRUNTIMES)
    numpy = installed_versions(["numpy"]).get("numpy", "")
    if overlap := overlapping_builds():
        reason, remedy = overlap.fault, overlap.remedy
    elif not versions:
        reason, remedy = in_one_line(error), f"{pip('install')} {ONNXRUNTIMES[0]}"
    else:
        ((package, version),) = versions.items()
        if numpy.startswith("2.") and _numbers(version) < _WITH_NUMPY_2:
            reason, remedy = f"{package} {version} needs NumPy 1, not {numpy}", f'{pip("install")} "numpy<2"'
        elif isinstance(error, ImportError) and error.name == "onnxruntime":
            reason, remedy = f"files of {package} are missing", _reinstall(package, version)
        else:
            reason, remedy = in_one_line(error), f"{pip('install')} -U {package}"
    return ClipRdEdgeError(f"ONNX Runtime cannot be imported: {reason}.", hint=remedy)


def _reinstall(package: str, version: str) -> str:
    return f"{pip('install')} --force-reinstall --no-deps {package}=={version}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))
