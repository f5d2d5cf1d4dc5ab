"""A server of a real model under load, by hand: `python tests/serve/load.py`.

It prints whether 1,000 requests of 16 clients, good and bad, were all answered as they must be, how the
server's memory grew, and how much faster batches answer than one image at a time. The model is the packed one
of `shiftaddvit compile pvt_v2_b0 --attention hamming_linear --mlp shift --activations int8`.
"""

import http.client
import io
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import shiftaddvit_jax as sav
from shiftaddvit_jax.classifier import from_pretrained

CLIENTS, REQUESTS, WARM, ROUNDS, ROUND = 16, 1000, 200, 7, 160
RAW = {"content-type": "image/jpeg"}


class Server:
    """A server in a process of its own."""

    def __init__(self, folder, *arguments):
        command = [sys.executable, "-m", "shiftaddvit_jax", "serve", str(folder), "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said = iter(self.process.stdout.readline, "")
        self.port = int(
            next(filter(None, (re.search(r"at http://127\.0\.0\.1:(\d+)", line) for line in said)))[1]
        )

    def rss(self):
        """MiB of memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def mean_batch(self):
        """Images computed at once."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        total, count = (re.search(f"batch_size_{part} (.*)", text)[1] for part in ("sum", "count"))
        return float(total) / float(count)

    def send_all(self, requests):
        """The status, the body and the seconds of each request, from all clients at once."""

        def client(mine):
            connection, answers = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120), []
            for index, (method, path, body) in mine:
                begin = time.perf_counter()
                connection.request(method, path, body, RAW)
                answer = connection.getresponse()
                answers.append((index, (answer.status, answer.read(), time.perf_counter() - begin)))
            return answers

        with ThreadPoolExecutor(CLIENTS) as pool:
            parts = pool.map(
                client, [list(enumerate(requests))[number::CLIENTS] for number in range(CLIENTS)]
            )
            return [answer for _, answer in sorted(chain(*parts), key=lambda each: each[0])]

    def end(self):
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def save(image, kind="JPEG"):
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def check_mixed(server, classifier, photos):
    """Good and bad requests, each answered as it must be, and memory that does not grow."""
    huge, draw = save(Image.new("RGB", (10_000, 5_000)), "PNG"), random.Random(0)
    bad = {
        "corrupt": (("POST", "/predict", photos[0][:2000]), 422),
        "50 megapixels": (("POST", "/predict", huge), 422),
        "wrong method": (("PUT", "/predict", photos[0]), 405),
        "body too long": (("POST", "/predict", bytes(2 * 2**20)), 413),
        "no such path": (("POST", "/nothing", photos[0]), 404),
    }
    kinds = [draw.choice([*bad, *range(10)]) for _ in range(WARM + REQUESTS)]
    photo = [draw.randrange(len(photos)) for _ in kinds]
    requests = [
        bad[kind][0] if kind in bad else ("POST", "/predict", photos[which])
        for kind, which in zip(kinds, photo, strict=True)
    ]
    expected = classifier(photos)
    server.send_all(requests[:WARM])
    before = server.rss()
    answers = server.send_all(requests[WARM:])
    wrong = dict.fromkeys(["good", *bad], 0)
    for kind, which, (status, body, _) in zip(kinds[WARM:], photo[WARM:], answers, strict=True):
        if kind in bad:
            wrong[kind] += status != bad[kind][1] or "error" not in json.loads(body)
            continue
        found = json.loads(body)["results"][0]["classes"] if status == 200 else []
        good = [each["index"] for each in found] == [
            answer.index for answer in expected[which]
        ] and np.allclose(
            [each["probability"] for each in found],
            [answer.probability for answer in expected[which]],
            rtol=1e-3,
        )
        wrong["good"] += not good
    after = server.rss()
    print(f"wrong answers to {REQUESTS} requests of {CLIENTS} clients: {wrong}")
    print(
        f"memory: {before:.0f} MiB after {WARM} requests, {after:.0f} at the end ({after / before - 1:+.1%})"
    )


def compare(servers, photos):
    """Images a second, and the times of requests, of servers in turns."""
    requests = [("POST", "/predict", photos[index % len(photos)]) for index in range(ROUND)]
    rates, times = {name: [] for name in servers}, {name: [] for name in servers}
    for _ in range(ROUNDS):
        for name, server in servers.items():
            begin = time.perf_counter()
            answers = server.send_all(requests)
            rates[name].append(ROUND / (time.perf_counter() - begin))
            assert all(status == 200 for status, *_ in answers)
            times[name] += [1e3 * seconds for *_, seconds in answers]
    for name in servers:
        p50, p99 = np.percentile(times[name], [50, 99])
        rate, batch = np.median(rates[name]), servers[name].mean_batch()
        print(f"{name}: {rate:.1f} images/s; p50 {p50:.0f} ms, p99 {p99:.0f} ms; {batch:.1f} images a batch")
    batched, alone = rates.values()
    ratios = np.array(batched) / np.array(alone)
    print(f"ratio: {np.median(ratios):.2f}, from {ratios.min():.2f} to {ratios.max():.2f} in {ROUNDS} rounds")


def main():
    """Load servers, and print what came of it."""
    random_pixels = np.random.default_rng(0)
    small = [Image.fromarray(random_pixels.integers(0, 256, (16, 20, 3), np.uint8)) for _ in range(12)]
    photos = [save(image.resize((320, 256), Image.Resampling.BICUBIC)) for image in small]
    with tempfile.TemporaryDirectory() as folder:
        settings = {"attention": "hamming_linear", "mlp": "shift", "activations": "int8"}
        model = sav.create_model("pvt_v2_b0", **settings)
        checkpoint = Path(folder) / "pvt_v2_b0" / "model"
        sav.save_model(checkpoint, model, sav.pack(model, sav.init_variables(model, jax.random.key(0))))
        servers = {
            "--max-batch 8": Server(checkpoint, "--max-body", "1"),
            "--max-batch 1": Server(checkpoint, "--max-batch", "1"),
        }
        check_mixed(servers["--max-batch 8"], from_pretrained(checkpoint), photos)
        compare(servers, photos)
        print("exit codes:", *(server.end() for server in servers.values()))
        classifier = from_pretrained(checkpoint)
        classifier.warm_up(8)
        inputs, times = np.stack([classifier.preprocess(photo) for photo in photos[:8]]), {1: [], 8: []}
        for _ in range(15):
            for batch, found in times.items():
                begin = time.perf_counter()
                classifier.logits(inputs[:batch])
                found.append(batch / (time.perf_counter() - begin))
        print(
            "Classifier.logits alone:",
            {batch: f"{np.median(each):.0f} images/s" for batch, each in times.items()},
        )


if __name__ == "__main__":
    main()
