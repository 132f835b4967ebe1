# SPDX-License-Identifier: Apache-2.0
"""Makes the README's links absolute, in place: a package index has none of the files beside it.

The workflow that builds packages calls this, since it knows where the repository is:
python docs/absolute_links.py https://github.com/OWNER/NAME REVISION
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def with_absolute_links(text: str, repository: str, revision: str) -> str:
    pages, files = f"{repository}/blob/{revision}/", f"{repository}/raw/{revision}/"
    text = re.sub(r"\]\((?!https:|#)([^)\s]+)\)", rf"]({pages}\1)", text)
    return re.sub(r"\b(src|srcset)=\"(?!https:)([^\"]+)\"", rf'\1="{files}\2"', text)


if __name__ == "__main__":
    readme = Path(__file__).resolve().parents[1] / "README.md"
    readme.write_text(with_absolute_links(readme.read_text(), *sys.argv[1:]))
