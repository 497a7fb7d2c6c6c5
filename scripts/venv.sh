#!/bin/sh
# Makes target/venv with pyarrow, for the scripts that read or write Parquet. Quick when it is there.
set -eu

python=target/venv/bin/python
if ! "$python" -c 'import pyarrow' >/dev/null 2>&1; then
    echo "venv: fetching pyarrow into target/venv (50 MB, once)"
    mkdir -p target
    python3 -m venv --clear target/venv
    "$python" -m pip install --quiet --disable-pip-version-check --only-binary :all: 'pyarrow>=18,<30'
fi
