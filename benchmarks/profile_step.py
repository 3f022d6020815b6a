"""Where the time of a training step goes: the profiler's table for eager and two fused variants.

    python benchmarks/profile_step.py [--device cuda] [--models resnet50] [--batch 128]
        [--output profile.txt]

bfloat16 by autocast, channels last. Writes the tables to --output after each variant.
"""

import argparse

from common import argument_parser, begin
from torch.profiler import ProfilerActivity, profile
from workloads import ON_CPU, ON_GPU, Workload

VARIANTS = ("eager", 1.0, "auto")
LONGEST_TABLE = 45  # rows


def tables(load: Workload, activities: list[ProfilerActivity], order: str):
    for memory in VARIANTS:
        net = load.model if memory == "eager" else load.fused(memory)[0]
        step = load.step(net)
        for _ in range(3):
            step()
        with profile(activities=activities) as profiler:
            step()
        table = profiler.key_averages().table(
            sort_by=order, row_limit=LONGEST_TABLE, max_name_column_width=90
        )
        yield f"{load.name}, {memory if memory == 'eager' else f'fuse {memory}'}\n{table}\n"


def arguments_given() -> argparse.Namespace:
    parser = argument_parser(__doc__, rounds=1)
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    return parser.parse_args()


def main() -> None:
    arguments = arguments_given()
    begin(arguments)
    on_gpu = arguments.device.type == "cuda"
    configurations = ON_GPU if on_gpu else ON_CPU
    configuration = next(c for c in configurations if c.dtype == "bfloat16")
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    written = []
    for name in arguments.models:
        for table in tables(Workload.of(name, arguments, configuration), activities, order):
            written.append(table)
            print(table)
            if arguments.output:
                arguments.output.write_text("\n".join(written), "utf-8")


if __name__ == "__main__":
    main()
