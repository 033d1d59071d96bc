"""Versions of what numbers come from: results and checkpoints hold them."""

import contextlib
import platform
from collections.abc import Iterable
from importlib import metadata


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """
    Look up versions.

    :param packages: Their names; those that are not installed are left out.
    :return: By name, Python first.
    """
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
