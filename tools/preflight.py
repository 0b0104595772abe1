"""Measure every rank and every link before a long run, and name the slow ones.

torchrun --standalone --nproc-per-node 8 tools/preflight.py
PREFLIGHT=1 sbatch --nodes=256 launch/slurm.sh configs/large.yaml
python tools/preflight.py --quick
"""

import argparse

from trinity.command_line import HelpFormatter, file_to_write
from trinity.errors import UserError, run_main
from trinity.io.json_files import write_json


def parse() -> argparse.Namespace:
    """The command line."""
    from trinity.parallel import preflight_report

    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{preflight_report.__doc__}",
        epilog="Exit code 1 if a rank or node is slow, or versions differ (torchrun adds lines of its own); 0 else.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--threshold", type=float, default=10, metavar="PERCENT", help="slow: this far below median")
    parser.add_argument("--seconds", type=float, help="of each measurement (3; CPU 1)")
    parser.add_argument("--gemm", type=int, metavar="N", help="side of the matrices (8192; CPU 1024)")
    parser.add_argument("--copy-mib", type=int, metavar="MIB", help="size of the copied tensor (1024; CPU 128)")
    parser.add_argument("--reduce-mib", type=int, metavar="MIB", help="size of the reduced tensor (1024; CPU 16)")
    parser.add_argument("--quick", action="store_true", help="small and short: to see that all ranks answer")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write everything there")
    arguments = parser.parse_args()
    if not 0 < arguments.threshold <= 100:
        raise UserError(f"--threshold {arguments.threshold:g} is not a percentage; write one in (0, 100]")
    for name in ("seconds", "gemm", "copy_mib", "reduce_mib"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g} must be above 0")
    return arguments


def main() -> int:
    """Measure on every rank; rank 0 prints."""
    arguments = parse()
    import torch.distributed as dist

    from trinity.parallel import preflight
    from trinity.parallel.preflight_report import find_outliers, mismatches, sentence, table

    device = preflight.init_process_group()
    workload = preflight.default_workload(device.type == "cuda", arguments.quick)
    given = {name: getattr(arguments, name) for name in workload._fields if getattr(arguments, name) is not None}
    workload = workload._replace(**given)
    reports = preflight.measure(workload, device)
    rank = dist.get_rank()
    dist.destroy_process_group()
    outliers = find_outliers(reports, arguments.threshold / 100)
    version_mismatches = mismatches(reports)
    if rank == 0:
        print(table(reports))
        print("\n".join([*map(sentence, outliers), *version_mismatches]) or "no rank and no node stands out")
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            written = {"effort": workload._asdict(), "threshold": arguments.threshold / 100, "ranks": reports}
            written |= {"odd": [outlier._asdict() for outlier in outliers], "mismatches": version_mismatches}
            write_json(arguments.json, written)
    return 1 if outliers or version_mismatches else 0


if __name__ == "__main__":
    run_main(main)
