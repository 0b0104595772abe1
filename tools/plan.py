"""Estimate the memory, communication, step time and GPU-hours of a run on N GPUs, before it starts.

python tools/plan.py configs/large.yaml --gpus 2048 --gpu b300
python tools/plan.py configs/nano.yaml --gpus 64 --gpu h100
python tools/plan.py configs/nano_1gpu.yaml recompute=none batch.microbatch=4 --json plan.json
python tools/plan.py configs/smoke.yaml --gpu name=mygpu,tflops=100,gib=24,gbs=1000
"""

import argparse

from trinity.command_line import HelpFormatter, file_to_write
from trinity.errors import run_main


def parse() -> argparse.Namespace:
    """Parse the command line."""
    from trinity.hardware import GPUS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("settings", nargs="*", metavar="a.b=value", help="settings that override the file's")
    parser.add_argument(
        "--gpus",
        type=int,
        help="number of GPUs; if the config's mesh does not fit it, another mesh is picked (default: the product of "
        "the mesh's fixed sizes)",
    )
    parser.add_argument(
        "--gpu",
        default="h200",
        help=f"kind of GPU: {', '.join(GPUS)}; cpu (this machine); or name=…,tflops=…,gib=…,gbs=… (bf16 TFLOP/s, GiB "
        "and GB/s of memory; also fp32= in TFLOP/s, link= and network= in GB/s, per_node=) (default: %(default)s)",
    )
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the plan as JSON (default: no)")
    return parser.parse_intermixed_args()


def main() -> None:
    """Plan the run and print the plan."""
    arguments = parse()
    from trinity.config import load_config
    from trinity.hardware import find_gpu
    from trinity.io.json_files import write_json
    from trinity.planning.plan import make_plan
    from trinity.planning.tables import as_text, as_values

    gpu = find_gpu(arguments.gpu)
    config = load_config(arguments.config, arguments.settings)
    plan = make_plan(config, arguments.gpus, gpu, pick=arguments.gpus is not None)
    print(as_text(plan))
    if arguments.json:
        write_json(arguments.json, as_values(plan))


if __name__ == "__main__":
    run_main(main)
