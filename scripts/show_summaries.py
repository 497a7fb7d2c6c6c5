"""Prints a few rows of a finished run: show_summaries.py FOLDER [COUNT]."""

import pathlib
import shutil
import sys
import textwrap

import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    parts = sorted(folder.glob("*.parquet"))
    if not parts:
        sys.exit(f"no Parquet file in {folder}: the run wrote nothing there")
    table = pa.concat_tables([pq.read_table(part) for part in parts]).sort_by("id")
    width = min(100, shutil.get_terminal_size().columns)
    print(f"\n{table.num_rows} summaries in {folder}, the first {min(count, table.num_rows)}:\n")
    for row in table.slice(0, count).to_pylist():
        print(f"  {row['title']}")
        answer = row["summary"].strip() or "(empty)"
        print(textwrap.fill(answer, width, initial_indent="    → ", subsequent_indent="      ") + "\n")


if __name__ == "__main__":
    main()
