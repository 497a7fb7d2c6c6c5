"""Measures Tidemill and its peer on a GPU and sets each figure beside its goal: a table, and JSON with all rows.

For each shape, runs `tidemill bench engine` with random weights in bf16 and in fp8, then continuous batching of Hugging
Face transformers on the same job. What cannot run here has a row too, with the reason. Goals are for Qwen3-8B on an
H200.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIDEMILL = pathlib.Path(os.environ.get("TIDEMILL", ROOT / "target" / "release" / "tidemill"))
PEER = pathlib.Path(__file__).resolve().parent / "peers" / "transformers_batch.py"
SHAPES = ["qwen3-8b", "llama-3.1-8b", "smollm2-135m"]
JOB = "summaries, 3000/200, distinct"
SHARED_JOB = "summaries, 3000/200, 1000 shared"
# What fp8 is measured on besides.
FP8_ROWS = ["summaries", "128/2048", "1000/1000", "2048/128", "decode"]


class NotRun(Exception):
    """With the reason."""


class Reports:
    """What was measured of a shape, by name; a reason where it was not."""

    def __init__(self, args, shape):
        self.args, self.shape, self.reports = args, shape, {}

    def tidemill(self, dtype, only):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "report.json"
            command = [TIDEMILL, "bench", "engine", "--device", self.args.device, "--shape", self.shape,
                       "--dtype", dtype, "--requests", str(self.args.requests), "--repeat", str(self.args.repeat),
                       "--json", path]
            command += [flag for text in only for flag in ("--only", text)]
            done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            if done.returncode != 0:
                raise NotRun(reason(done.stderr) or f"tidemill ended with {done.returncode}")
            print(done.stdout, flush=True)
            return json.loads(path.read_text())

    def peer(self):
        command = [self.args.python, PEER, "--shape", self.shape, "--requests", str(self.args.requests)]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            raise NotRun((done.stderr.strip().splitlines() or [f"the peer ended with {done.returncode}"])[-1])
        report = json.loads(lines[-1])
        if "not_run" in report:
            raise NotRun(report["not_run"])
        return report

    def measure(self):
        parts = {"bf16": lambda: self.tidemill("bf16", self.args.only),
                 "fp8": lambda: self.tidemill("fp8", self.args.only or FP8_ROWS)}
        if not self.args.no_peer:
            parts["peer"] = self.peer
        for name, part in parts.items():
            print(f"{self.shape}, {name} …", file=sys.stderr, flush=True)
            try:
                self.reports[name] = part()
            except NotRun as why:
                self.reports[name] = {"not_run": str(why)}

    def of(self, name):
        report = self.reports.get(name, {"not_run": "left out"})
        if "not_run" in report:
            raise NotRun(report["not_run"])
        return report

    def row(self, dtype, name, part="rows"):
        found = [row for row in self.of(dtype)[part] if row["name"] == name]
        if not found:
            raise NotRun("left out")
        return found[0]


def reason(stderr):
    """The error of a report of Tidemill, without its frame."""
    lines = [line.strip().lstrip("×│╰─▶ ").strip() for line in stderr.splitlines()]
    lines = [line for line in lines if line and not line.endswith("…")]
    end = next((index for index, line in enumerate(lines) if line.startswith("help:")), len(lines))
    return ": ".join(lines[:end])


def share(value, limit, goal):
    return {"measured": value / limit, "text": f"{100 * value / limit:.0f} %", "met": value / limit >= goal}


def fraction(row, goal):
    return {"measured": row["fraction"], "text": f"{100 * row['fraction']:.0f} %", "met": row["fraction"] >= goal}


def prompt_rate(row, goal):
    rate = row["prompt_tokens_per_second"]
    return {"measured": rate, "text": f"{rate:,.0f} tokens/s", "met": rate >= goal}


def summaries_bf16(reports):
    """Either of two: a share of the peak, or a rate."""
    row, ceilings = reports.row("bf16", JOB), reports.of("bf16")["ceilings"]
    by_share, by_rate = share(row["tflops"], ceilings["weight_tflops"], 0.6), prompt_rate(row, 40_000)
    text = f"{by_share['text']}, {by_rate['text']}"
    return {"measured": by_rate["measured"], "share_of_gemm": by_share["measured"], "text": text,
            "met": by_share["met"] or by_rate["met"]}


def times_peer(reports):
    own, peer = reports.row("bf16", JOB), reports.of("peer")
    times = own["prompt_tokens_per_second"] / peer["prompt_tokens_per_second"]
    return {"measured": times, "text": f"{times:.1f} times {peer['peer']}", "met": times >= 10}


def host_time(reports):
    row = reports.row("bf16", "decode, batch 256")
    text = f"{row['host_us_p50']:.0f} µs, 99th percentile {row['host_us_p99']:.0f} µs"
    return {"measured": row["host_us_p50"], "text": text, "met": row["host_us_p50"] < 100}


def loading(reports):
    rates = reports.of("bf16")["loading"]
    own, bus = rates["weights_gb_per_second"], rates["bus_gb_per_second"]
    return {"measured": own, "text": f"{own:.1f} of {bus:.1f} GB/s", "met": own >= 0.9 * bus}


def shown(name, dtype):
    """A row without a goal of ours."""
    def measure(reports):
        row = reports.row(dtype, name)
        rates = [row["prompt_tokens_per_second"], row["output_tokens_per_second"]]
        text = f"{rates[0]:,.0f} in, {rates[1]:,.0f} out tokens/s, {100 * row['fraction']:.0f} % of the bound"
        return {"measured": rates[1], "text": text}
    return measure


ROWS = [
    ("3,000/200, distinct, bf16", "60 % of the GEMM rate, or 40,000 prompt tokens/s", summaries_bf16),
    ("3,000/200, distinct, fp8", "60,000 prompt tokens/s", lambda r: prompt_rate(r.row("fp8", JOB), 60_000)),
    ("attention, prefill 8192", "60 % of the GEMM rate",
     lambda r: fraction(r.row("bf16", "attention, prefill 8192", "attention"), 0.6)),
    ("attention, decode, 256 over 3000", "80 % of the copy rate",
     lambda r: fraction(r.row("bf16", "attention, decode, 256 over 3000", "attention"), 0.8)),
    ("decode, batch 1, bf16", "70 % of the bound by memory", lambda r: fraction(r.row("bf16", "decode, batch 1"), 0.7)),
    ("3,000/200 beside transformers", "10 times its rate", times_peer),
    ("host time between steps, 256 sequences", "100 µs", host_time),
    ("weights to the device", "the speed of the bus, within 10 %", loading),
    ("3,000/200, 1,000 shared, bf16", "", shown(SHARED_JOB, "bf16")),
    ("3,000/200, 1,000 shared, fp8", "", shown(SHARED_JOB, "fp8")),
    *((f"{name}, {dtype}", "", shown(name, dtype)) for name in ("128/2048", "1000/1000", "2048/128")
      for dtype in ("bf16", "fp8")),
    *((f"decode, batch {batch}, {dtype}", "", shown(f"decode, batch {batch}", dtype)) for batch in (8, 64, 256)
      for dtype in ("bf16", "fp8")),
    *((f"prefill {length}, bf16", "", shown(f"prefill {length}", "bf16")) for length in (512, 2048, 8192)),
]


def compare(reports):
    rows = []
    for name, goal, measure in ROWS:
        try:
            row = measure(reports)
        except NotRun as why:
            row = {"text": f"not run: {why}"}
        rows.append({"row": name, "goal": goal, "met": None, **row})
    return rows


def table(rows):
    met = {True: "yes", False: "no", None: ""}
    lines = [["", "goal", "measured", "met"]]
    lines += [[row["row"], row["goal"], row["text"], met[row["met"]]] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", action="append", help="may be repeated; left out: " + ", ".join(SHAPES))
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", action="append", default=[], help="only rows whose name holds this text")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has torch and transformers")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=pathlib.Path, default=ROOT / "out" / "gpu-bench.json")
    args = parser.parse_args()
    if not TIDEMILL.exists():
        sys.exit(f"no program {TIDEMILL}; run: make build")
    measured = {}
    for shape in args.shape or SHAPES:
        reports = Reports(args, shape)
        reports.measure()
        rows = compare(reports)
        measured[shape] = {"rows": rows, "reports": reports.reports}
        # After each shape, whatever becomes of the next.
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(measured, indent=2) + "\n")
        print(f"{shape}\n\n{table(rows)}\n", flush=True)


if __name__ == "__main__":
    main()
