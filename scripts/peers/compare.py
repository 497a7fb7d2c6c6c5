"""Runs Tidemill and other engines side by side on the same model, and prints one table of medians.

    make build && python3 scripts/offline_job.py && python3 scripts/peers/compare.py [--repeat 5] [--peer ik] [--json FILE]

Peers are measured if they are installed; these variables name the folders of their programs (README.md beside this
file says how to build them):
    TIDEMILL_PEER_LLAMA_CPP   llama-server, llama-bench, llama-batched-bench, llama-quantize
    TIDEMILL_PEER_IK          llama-server, llama-bench, llama-batched-bench
All engines take turns in every round, so that a machine which gets slower does so for all. A peer's text is checked
before its speed is taken. The job's time of a peer begins when its servers are ready; Tidemill's includes its start.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TIDEMILL = pathlib.Path(os.environ.get("TIDEMILL", ROOT / "target" / "release" / "tidemill"))
MODEL = "smollm2-135m-instruct"
FOLDER = ROOT / "target" / "peers"
ANSWER_LEN = 48
PREFIX_LEN = 512
DECODE_LEN = 32
LONGEST_START_S = 120
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
PARTS = ("engine", "offline", "start")


class Peer:
    """An engine of the llama.cpp family: one program for prefill, one for decode, a server for jobs."""

    def __init__(self, name, folder, model, bench, server, num_servers, num_slots):
        self.name, self.folder, self.model = name, pathlib.Path(folder).resolve(), model
        self.bench_flags, self.server_flags = bench, server
        self.num_servers, self.num_slots = num_servers, num_slots

    def engine(self, quick):
        found = {}
        lens = [128, 512] if quick else [128, 512, 2048]
        flags = ["-p", ",".join(map(str, lens)), "-n", "0", "-r", "1", "-t", str(num_cores()), "-o", "json"]
        for row in json.loads(self.call("llama-bench", flags + self.bench_flags["prefill"]).stdout):
            found[f"prefill {row['n_prompt']}"] = row["avg_ts"]
        for kind, batches, more in [("shared", [1, 8, 32, 64], ["-pps"]), ("distinct", [8, 16], [])]:
            batches = batches[:2] if quick else batches
            flags = ["-npp", str(PREFIX_LEN), "-ntg", str(DECODE_LEN), "-npl", ",".join(map(str, batches)),
                     "-c", str(max(batches) * (PREFIX_LEN + 2 * DECODE_LEN)), "-b", "2048", "-ub", "512", "-t", str(num_cores())]
            done = self.call("llama-batched-bench", flags + more + self.bench_flags["decode"])
            # One of the peers prints its table to standard error.
            for row in re.findall(r"^\|(.*)\|$", done.stdout + done.stderr, re.MULTILINE):
                cells = [cell.strip() for cell in row.split("|")]
                if cells[0].isdigit():
                    found[f"decode, {kind} {PREFIX_LEN}, batch {cells[2]}"] = float(cells[7])
        return found

    def call(self, program, flags):
        # Some programs leave a log in the folder they run in.
        done = subprocess.run([self.folder / program, "-m", self.model, *flags], cwd=FOLDER, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode != 0:
            sys.exit(f"{self.name}: {program} failed with {done.returncode}\n{done.stderr[-2000:]}")
        return done

    @contextlib.contextmanager
    def servers(self):
        running = {}
        try:
            for index in range(self.num_servers):
                port = free_port()
                pin = ["taskset", "-c", str(cores()[index])] if self.num_servers > 1 else []
                command = [*pin, self.folder / "llama-server", "-m", self.model, "--port", str(port),
                           "--cache-ram", "0", *self.server_flags]
                running[port] = subprocess.Popen(command, cwd=FOLDER, stdout=subprocess.DEVNULL,
                                                 stderr=subprocess.DEVNULL)
            for port, server in running.items():
                answer = first_answer(server, port, self.name)
                if "Paris" not in answer:
                    sys.exit(f"{self.name} answers {answer!r}: its speed says nothing")
            yield running
        finally:
            for server in running.values():
                server.kill()
                server.wait()

    def offline(self, requests):
        waiting, lock, failed = list(reversed(requests)), threading.Lock(), []
        tokens = {"in": 0, "out": 0}

        def client(port):
            while not failed:
                with lock:
                    if not waiting:
                        return
                    prompt = waiting.pop()["prompt"]
                try:
                    answer = complete(port, prompt, ANSWER_LEN)
                except OSError as error:
                    failed.append(error)
                    return
                with lock:
                    tokens["in"] += answer["tokens_evaluated"]
                    tokens["out"] += answer["tokens_predicted"]

        with self.servers() as running:
            start = time.perf_counter()
            clients = [threading.Thread(target=client, args=(port,))
                       for port in running for _ in range(self.num_slots)]
            for thread in clients:
                thread.start()
            for thread in clients:
                thread.join()
            seconds = time.perf_counter() - start
            memory = sum(peak_memory_mib(server.pid) for server in running.values())
        if failed:
            sys.exit(f"{self.name}: {failed[0]}")
        if tokens["out"] != ANSWER_LEN * len(requests):
            sys.exit(f"{self.name} answered {tokens['out']} tokens, expected {ANSWER_LEN * len(requests)}")
        return job_figures(seconds, len(requests), tokens["in"], memory)

    def start(self):
        begin = time.perf_counter()
        with self.servers():
            return {"start to first token, ms": 1000 * (time.perf_counter() - begin)}


class Tidemill:
    name = "Tidemill"

    def bench(self, kind, flags):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "report.json"
            subprocess.run([TIDEMILL, "bench", kind, "--repeat", "1", "--json", path, *flags], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return json.loads(path.read_text())

    def engine(self, _quick):
        self.report = self.bench("engine", [])
        return {figure["name"]: figure["tokens_per_second"] for figure in self.report["figures"]}

    def offline(self, requests):
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.write("".join(json.dumps(request) + "\n" for request in requests))
            file.flush()
            # An engine for each core, as the best peer runs a server for each.
            device = "[" + ", ".join(f"cpu:{core}" for core in range(num_cores())) + "]"
            report = self.bench("offline", ["--requests", file.name, "--max-tokens", str(ANSWER_LEN), "--device", device])
        return job_figures(report["wall_seconds"], len(requests), report["summary"]["prompt_tokens"],
                           report["peak_memory_mib"])

    def start(self):
        begin = time.perf_counter()
        with subprocess.Popen([TIDEMILL, "bench", "first-token", MODEL], stdout=subprocess.PIPE) as process:
            process.stdout.read(1)
            return {"start to first token, ms": 1000 * (time.perf_counter() - begin)}


def job_figures(seconds, num_requests, prompt_tokens, memory):
    return {"offline job, s": seconds, "offline job, requests/s": num_requests / seconds,
            "offline job, prompt tokens": prompt_tokens, "offline job, peak memory, MiB": memory}


def cores():
    return sorted(os.sched_getaffinity(0))


def num_cores():
    return len(cores())


def peak_memory_mib(pid):
    return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) // 1024


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def complete(port, prompt, max_tokens):
    body = {"prompt": prompt, "n_predict": max_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def first_answer(server, port, name):
    """Waits for a server to answer; a refused connection or an error means that it still loads."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < LONGEST_START_S:
        if server.poll() is not None:
            sys.exit(f"{name}: the server ended with {server.returncode}")
        try:
            return complete(port, QUESTION, 8)["content"]
        except (ConnectionError, urllib.error.URLError):
            time.sleep(0.002)
    sys.exit(f"{name}: the server does not answer")


def requantized(quantize, kind):
    """The model in another weight format, made from the shipped file once."""
    cache = pathlib.Path(os.environ.get("TIDEMILL_CACHE", pathlib.Path.home() / ".cache" / "tidemill"))
    shipped = next((cache / "models" / MODEL).glob("*.gguf"), None)
    if shipped is None:
        sys.exit(f"no model in {cache}; run: make models")
    made = FOLDER / f"{MODEL}-{kind}.gguf"
    if not made.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        subprocess.run([quantize, "--allow-requantize", shipped, made, kind], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return made


def installed():
    """The peers that are here, each with the best settings found for it on a CPU."""
    llama, ik = os.environ.get("TIDEMILL_PEER_LLAMA_CPP"), os.environ.get("TIDEMILL_PEER_IK")
    if not llama:
        if ik:
            sys.exit("TIDEMILL_PEER_LLAMA_CPP is needed too: its llama-quantize makes the model")
        return []
    quantize, threads = pathlib.Path(llama) / "llama-quantize", str(num_cores())
    server = ["-np", "8", "-t", threads, "-tb", threads, "-b", "2048", "-ub", "512", "-c", "8192",
              "-fa", "off"]
    peers = [Peer(f"llama.cpp {kind}", llama, requantized(quantize, kind),
                  {"prefill": ["-fa", "1"], "decode": ["-fa", "off"]}, server, 1, 8)
             for kind in ("Q4_0", "Q8_0")]
    if ik:
        peers.append(Peer("ik_llama.cpp Q8_0", ik, requantized(quantize, "Q8_0"),
                          {"prefill": ["-rtr", "1", "-fa", "1"],
                           "decode": ["-rtr", "-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"]},
                          ["-np", "1", "-t", "1", "-tb", "1", "-fa", "on", "-b", "2048", "-ub", "512", "-c", "1024",
                           "-ctk", "q8_0", "-ctv", "q8_0", "-rtr"], num_cores(), 1))
    return peers


def table(samples, engines):
    names = [engine.name for engine in engines]
    lines = [["", *names, "to the best peer"]]
    for figure, by_engine in samples.items():
        middle = {name: statistics.median(values) for name, values in by_engine.items()}
        peers = [value for name, value in middle.items() if name != Tidemill.name]
        less_is_better = figure.endswith((", s", ", ms", ", MiB"))
        ratio = ""
        if peers and Tidemill.name in middle and "tokens" != figure.split()[-1]:
            own = middle[Tidemill.name]
            ratio = f"{min(peers) / own if less_is_better else own / max(peers):.2f}"
        number = lambda value: "" if value is None else f"{value:,.2f}" if value < 10 else f"{value:,.0f}"
        lines.append([figure, *(number(middle.get(name)) for name in names), ratio])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                               for column, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


def main():
    parser = argparse.ArgumentParser(description="Runs Tidemill and its peers side by side.")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--only", choices=PARTS, action="append", help="measure a part; may be repeated")
    parser.add_argument("--requests", type=pathlib.Path, default=ROOT / "data" / "offline-job.jsonl")
    parser.add_argument("--peer", action="append", help="only peers whose name holds this text; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, eight requests: shows that all works")
    args = parser.parse_args()
    parts = args.only or PARTS
    # An end from outside must not leave servers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    if not TIDEMILL.exists():
        sys.exit(f"no program {TIDEMILL}; run: make build")
    requests = []
    if "offline" in parts:
        if not args.requests.exists():
            sys.exit(f"no requests file {args.requests}; run: python3 scripts/offline_job.py")
        requests = [json.loads(line) for line in args.requests.read_text().splitlines()]
        requests = requests[:8] if args.quick else requests
    tidemill = Tidemill()
    wanted = args.peer or [""]
    engines = [tidemill, *(peer for peer in installed() if any(text in peer.name for text in wanted))]
    samples, machine = {}, None
    for round_index in range(args.repeat):
        for part in parts:
            for engine in engines:
                print(f"{part}, {engine.name} ({round_index + 1} of {args.repeat}) …", file=sys.stderr, flush=True)
                arguments = {"engine": [args.quick], "offline": [requests], "start": []}[part]
                for figure, value in getattr(engine, part)(*arguments).items():
                    samples.setdefault(figure, {}).setdefault(engine.name, []).append(value)
        # After every round, so that a run which is ended early leaves what it measured.
        machine = getattr(tidemill, "report", {}).get("machine")
        if args.json:
            report = {"rounds": round_index + 1, "samples": samples, "machine": machine}
            args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(table(samples, engines))
    if machine:
        print("\nmachine: " + ", ".join(f"{name} {value:.0f}" for name, value in machine.items()
                                        if isinstance(value, float)))


if __name__ == "__main__":
    main()
