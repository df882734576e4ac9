"""`make scale-demo`: a Ray cluster of three nodes on this machine fills one store, one node is killed midway.

Then the store is verified and compared with one worker's, and merged with one of other text. Needs `writesae[ray]`.

    python scripts/scale_demo.py [--tokens 40000] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WRITESAE = [sys.executable, "-m", "writesae.cli"]


def command(*arguments: object, **more) -> dict:
    """Runs `writesae`; what it printed."""
    print("$ writesae", *arguments, flush=True)
    done = subprocess.run([*WRITESAE, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True, **more)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--out", help="keep the stores in this folder")
    args = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT / "bench"))
    from common import tables
    from kill_workers import documents
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.out or scratch)
        for name in ("text", "other"):
            if not (folder / name).exists():
                documents(folder / name, 4 * args.tokens, length=3000 if name == "text" else 2000)
        began = time.perf_counter()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(3):
            cluster.add_node(num_cpus=1)
        print(f"Ray: three nodes after {time.perf_counter() - began:.1f} s", flush=True)
        options = ["--max-tokens", args.tokens, "--unit", "8kB", "--shard-passages", 6, "--context", 256, "--yes"]
        line = [*WRITESAE, "collect", folder / "text", "--out", folder / "ray", "--engine", "ray", *options]
        print("$ writesae", *line[3:], flush=True)
        driver = subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, text=True,
                                  env={**os.environ, "RAY_ADDRESS": cluster.address})  # fmt: skip
        while driver.poll() is None and len(list((folder / "ray" / "done").glob("unit-*.json"))) < 3:
            time.sleep(0.02)
        killed = driver.poll() is None
        if killed:
            cluster.remove_node(list(cluster.worker_nodes)[0], allow_graceful=False)
            print("a node killed; two are left", flush=True)
        summary = json.loads(driver.communicate()[0])
        cluster.shutdown()
        verified = command("verify", folder / "ray", "--json")
        one = command("collect", folder / "text", "--out", folder / "one", *options)
        ray, alone = tables(folder / "ray"), tables(folder / "one")
        same = ray.keys() == alone.keys() and all(ray[name].equals(x) for name, x in alone.items())
        command("collect", folder / "other", "--out", folder / "apart", *options)
        merged = command("merge", folder / "ray", folder / "apart", folder / "merged")
        sound = command("verify", folder / "merged", "--json")["sound"]
    print(
        f"{summary['units']} units, {summary['firings']:,} firings by Ray, a node killed midway: "
        f"{'sound' if verified['sound'] else 'DAMAGED'}, {'identical to' if same else 'UNLIKE'} one worker's; merged "
        f"with another store: {merged['firings']:,} firings, {'sound' if sound else 'DAMAGED'}"
    )
    sys.exit(not (killed and verified["sound"] and same and sound and one["firings"] == summary["firings"]))


if __name__ == "__main__":
    main()
