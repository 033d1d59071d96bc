"""What setup.cfg cannot say: README.md as a package index can show it, without pictures and links to files."""

import re
from pathlib import Path

from setuptools import setup

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
readme = re.sub(r"^!\[.*\]\(.*\)\n\n", "", readme, flags=re.MULTILINE)
readme = re.sub(r"\[([^]]+)\]\((?!https://)[^)]*\)", r"\1", readme)
setup(long_description=readme)
