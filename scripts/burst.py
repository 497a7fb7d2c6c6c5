"""Lets a burst of records arrive while the model is slow, beside a small pipeline of high priority on the same engine.

Fails unless memory stays where it was, nothing is lost or doubled, the lag falls steadily, the source is held back and
pauses, and the small pipeline answers nearly as fast as it does alone. Starts a broker of its own. Prints a table; writes
out/burst.json and the plot out/burst.svg.

    python3 scripts/burst.py target/release/tidemill [--records 100000]
"""

import argparse
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_GROWTH_MIB = 64
# The lag is of committed offsets and an end that is learned later, so it may seem to rise by what one transaction brings.
MAX_RISE_OF_LAG = 500
# The small pipeline beside the burst may take so many times what it takes alone, or so much more.
MAX_SLOWER, MAX_SLOWER_MS = 3, 50
# Long prompts of high priority that take the whole engine for some seconds.
NUM_LONG = 150
PIPELINE = """
name: {name}
priority: {priority}
model: {{ name: fake }}
source: {{ kafka: {{ brokers: '{brokers}', topics: [{name}-in] }} }}
steps:
  - generate: {{ name: answer, prompt: 'Summarize {{{{ text }}}}', max_tokens: 8 }}
sink: {{ kafka: {{ topic: {name}-out, commit_ms: 20 }} }}
errors: {{ kafka: {{ topic: {name}-errors }} }}
"""


def rss_mib(pid: int) -> float:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Run:
    def __init__(self, tidemill: str, folder: pathlib.Path, brokers: str):
        self.tidemill, self.folder, self.brokers = tidemill, folder, brokers
        self.samples: list[dict] = []
        self.begun = time.monotonic()
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]

    def topics(self, *args: str) -> str:
        command = [self.tidemill, "topics", *args, "--brokers", self.brokers]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def start(self) -> None:
        for name, priority in [("bulk", "normal"), ("online", "high")]:
            text = PIPELINE.format(name=name, priority=priority, brokers=self.brokers)
            (self.folder / f"{name}.yaml").write_text(text)
        command = [self.tidemill, "run", "--quiet", "--listen", f"127.0.0.1:{self.port}",
                   str(self.folder / "bulk.yaml"), str(self.folder / "online.yaml")]
        env = dict(os.environ, TIDEMILL_FAKE_DELAY_US="4")
        self.process = subprocess.Popen(command, env=env)

    def look(self) -> dict | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/snapshot", timeout=2) as answer:
                pipelines = {one["name"]: one for one in json.load(answer)["pipelines"]}
        except OSError:
            return None
        if len(pipelines) < 2 or any(not one["kafka"]["partitions"] for one in pipelines.values()):
            return None
        bulk = pipelines["bulk"]
        sample = {
            "seconds": time.monotonic() - self.begun,
            "rss_mib": rss_mib(self.process.pid),
            "lag": sum(one["lag"] or 0 for one in bulk["kafka"]["partitions"]),
            "in_flight": bulk["documents_in_flight"],
            "waiting": bulk["engines"][0]["waiting"],
            "done": bulk["documents_done"] + bulk["errors"],
            "held_back": bulk["is_held_back"],
            "paused": bulk["kafka"]["is_paused"],
            "online_done": pipelines["online"]["documents_done"],
        }
        self.samples.append(sample)
        return sample

    def ask_online(self, count: int) -> list[float]:
        """Sends single records and measures how long each takes from write to committed result."""
        times = []
        for number in range(count):
            line = self.folder / "one.jsonl"
            line.write_text(json.dumps({"text": f"question {number} of {time.monotonic()}"}) + "\n")
            done = self.look()["online_done"]
            self.topics("write", "online-in", "--from", str(line))
            written = time.monotonic()
            while self.look()["online_done"] == done:
                time.sleep(0.005)
            times.append(time.monotonic() - written)
        return times


    def flood(self, count: int) -> None:
        """Takes the engine away from the burst until these are answered."""
        lines = self.folder / "long.jsonl"
        with lines.open("w") as file:
            for number in range(count):
                file.write(json.dumps({"text": f"{number} " + "is urgent " * 600}) + "\n")
        done = self.look()["online_done"]
        self.topics("write", "online-in", "--from", str(lines))
        while self.look()["online_done"] < done + count:
            time.sleep(0.05)


def svg(samples: list[dict], growth: float) -> str:
    """Three curves over time, each scaled to its own largest value."""
    width, height, left, top = 860, 150, 70, 40
    end = samples[-1]["seconds"]
    rows = [("rss_mib", "resident memory, MiB", "#b5651d"), ("lag", "lag, records", "#1f5fbf"),
            ("in_flight", "documents in flight", "#2e8b57"), ("waiting", "waiting at the engine", "#8a2be2")]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 100}" height="{len(rows) * (height + 50) + 60}" '
             'font-family="sans-serif" font-size="13">',
             f'<text x="{left}" y="20" font-size="16">A burst: memory grows by {growth:.0f} MiB</text>']
    for index, (key, title, color) in enumerate(rows):
        base = top + index * (height + 50) + height
        most = max(one[key] for one in samples) or 1
        points = " ".join(f"{left + one['seconds'] / end * width:.1f},{base - one[key] / most * (height - 20):.1f}"
                          for one in samples)
        parts.append(f'<text x="{left}" y="{base - height + 14}">{title} (most: {most:,.0f})</text>'
                     f'<line x1="{left}" y1="{base}" x2="{left + width}" y2="{base}" stroke="#888"/>'
                     f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{points}"/>'
                     f'<text x="{left}" y="{base + 16}">0</text>'
                     f'<text x="{left + width - 40}" y="{base + 16}">{end:.0f} s</text>')
    return "\n".join(parts) + "\n</svg>\n"


def measure(run: Run, num_records: int) -> dict:
    for name in ("bulk", "online"):
        run.topics("create", f"{name}-in", f"{name}-out", f"{name}-errors", "--partitions", "4")
    lines = run.folder / "burst.jsonl"
    with lines.open("w") as file:
        for number in range(num_records):
            text = f"record {number} " + "with some words about the news of the day " * 5
            file.write(json.dumps({"id": number, "text": text}) + "\n")
    run.start()
    while run.look() is None:
        time.sleep(0.1)
    warm = run.folder / "warm.jsonl"
    with warm.open("w") as file:
        for number in range(2000):
            file.write(json.dumps({"id": 10_000_000 + number, "text": f"calm {number}"}) + "\n")
    run.topics("write", "bulk-in", "--from", str(warm))
    while run.look()["done"] < 2000:
        time.sleep(0.2)
    alone = run.ask_online(20)
    calm = max(one["rss_mib"] for one in run.samples)
    print(f"burst: calm at {calm:.0f} MiB; now {num_records:,} records", flush=True)
    first = len(run.samples)
    writing = threading.Thread(target=run.topics, args=("write", "bulk-in", "--from", str(lines)))
    begun = time.monotonic()
    writing.start()
    writing.join()
    written = time.monotonic() - begun
    beside = run.ask_online(20)
    waiting_beside = num_records + 2000 - run.look()["done"]
    run.flood(NUM_LONG)
    while run.look()["done"] < num_records + 2000:
        time.sleep(0.2)
    took = time.monotonic() - begun
    time.sleep(1.5)
    run.look()
    run.process.send_signal(signal.SIGINT)
    run.process.wait(timeout=60)
    rows = run.topics("read", "bulk-out", "--values").strip("\n").split("\n")
    ids = [json.loads(row)["id"] for row in rows]
    burst = run.samples[first:]
    lags = [one["lag"] for one in burst]
    falling = lags[lags.index(max(lags)):]
    rises = [later - earlier for earlier, later in zip(falling, falling[1:]) if later > earlier]
    return {
        "records": num_records,
        "written_seconds": written,
        "drained_seconds": took,
        "calm_mib": calm,
        "peak_mib": max(one["rss_mib"] for one in burst),
        "peak_in_flight": max(one["in_flight"] for one in burst),
        "was_held_back": any(one["held_back"] for one in burst),
        "was_paused": any(one["paused"] for one in burst),
        "waiting_beside_online": waiting_beside,
        "lost": num_records + 2000 - len(set(ids)),
        "doubled": len(ids) - len(set(ids)),
        "largest_rise_of_lag": max(rises, default=0),
        "online_p50_alone_ms": percentile(alone, 0.5) * 1000,
        "online_p95_alone_ms": percentile(alone, 0.95) * 1000,
        "online_p50_beside_ms": percentile(beside, 0.5) * 1000,
        "online_p95_beside_ms": percentile(beside, 0.95) * 1000,
    }


def faults(result: dict) -> list[str]:
    """What the burst has done that it must not do."""
    growth = result["peak_mib"] - result["calm_mib"]
    alone, beside = result["online_p95_alone_ms"], result["online_p95_beside_ms"]
    checks = [
        (growth <= MAX_GROWTH_MIB, f"memory grew by {growth:.1f} MiB, the bound is {MAX_GROWTH_MIB}"),
        (result["lost"] == 0, f"{result['lost']} records are lost"),
        (result["doubled"] == 0, f"{result['doubled']} records came twice"),
        (result["largest_rise_of_lag"] <= MAX_RISE_OF_LAG, f"the lag rose by {result['largest_rise_of_lag']}"),
        (result["was_held_back"], "the source was never held back"),
        (result["was_paused"], "the partitions were never paused"),
        (result["waiting_beside_online"] > 0, "the burst was over before the small pipeline was measured"),
        (beside < max(MAX_SLOWER * alone, alone + MAX_SLOWER_MS),
         f"the small pipeline took {beside:.0f} ms beside the burst (p95), {alone:.0f} ms alone"),
    ]
    return [message for holds, message in checks if not holds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tidemill")
    parser.add_argument("--records", type=int, default=100_000)
    args = parser.parse_args()
    tidemill = str(pathlib.Path(args.tidemill).resolve())
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        kafka = ["sh", str(ROOT / "scripts/kafka.sh")]
        started = subprocess.run(kafka + ["start", "--dir", str(folder / "kafka"), "--parent", str(os.getpid())],
                                 check=True, capture_output=True, text=True).stdout
        brokers = next(line.split("=", 1)[1] for line in started.splitlines() if line.startswith("KAFKA_BROKERS="))
        try:
            run = Run(tidemill, folder, brokers)
            result = measure(run, args.records)
        finally:
            subprocess.run(kafka + ["stop", "--dir", str(folder / "kafka")], check=False)
    growth = result["peak_mib"] - result["calm_mib"]
    out = ROOT / "out"
    out.mkdir(exist_ok=True)
    (out / "burst.json").write_text(json.dumps({**result, "samples": run.samples}) + "\n")
    (out / "burst.svg").write_text(svg(run.samples, growth))
    for key, value in result.items():
        print(f"{key:24} {value:,.1f}" if isinstance(value, float) else f"{key:24} {value}")
    print(f"memory grew by {growth:.1f} MiB (bound {MAX_GROWTH_MIB}); the plot is out/burst.svg")
    found = faults(result)
    if found:
        raise SystemExit("burst: " + "; ".join(found))


if __name__ == "__main__":
    main()
