"""Whole networks in integers beside their simulation, ONNX Runtime's kernels and the HTP backend, in one run.

The digit network on all 540 test images, the direction classifier on 3,000 lines, the recognizer on 600: accuracy,
answers in common, seconds.  Some ten minutes.  Run from the repository:

    python data/recipes/integers.py data/results/measured/03_integers.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
from record import record

from qtools.npu import htp
from qtools.npu.integer import IntegerNetwork
from qtools.ptq import agreement
from qtools.ptq.convert import Runner

TASKS = {
    "digits": lambda: agreement.digits("mini", agreement.Options(**agreement.FINE)),
    "digits_w8a16": lambda: agreement.digits("mini", agreement.Options(act_bw=16, **agreement.FINE)),
    "digits_w4a8": lambda: agreement.digits("mini", agreement.Options(weight_bw=4, **agreement.FINE)),
    "classifier": lambda: agreement.classifier(3000),
    "recognizer": lambda: agreement.recognizer(600),
}
TIMED = 10  # samples, thrice


def seconds(run: Callable[[Mapping[str, np.ndarray]], object], samples: list) -> float:
    """Of one sample: the best of three rounds."""
    run(samples[0])
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for sample in samples[:TIMED]:
            run(sample)
        rounds.append((time.perf_counter() - start) / len(samples[:TIMED]))
    return min(rounds)


def main() -> None:
    """Write the results where the chapter looks for them."""
    values: dict[str, float] = {}
    for name, make in TASKS.items():
        task = make()
        output = [task.network.graph.output[0].name]
        runs = {
            "simulated": Runner(task.network, output),
            "kernels": Runner(task.network, output, optimized=True),
            "integer": IntegerNetwork(task.network),
            "fixed": IntegerNetwork(task.network, requantize="fixed"),
        }
        answers = {}
        for side, run in runs.items():
            out = np.concatenate([run(sample)[0] for sample in task.samples])
            answers[side] = out.argmax(-1)
            values[f"{name}_{side}_right"] = task.right(out)
            values[f"{name}_{side}_agree"] = 100 * float(np.mean(answers[side] == answers["simulated"]))
            values[f"{name}_{side}_seconds"] = seconds(run, task.samples)
            print(name, side, values[f"{name}_{side}_right"], values[f"{name}_{side}_seconds"], flush=True)
        values[f"{name}_integer_over_kernels"] = values[f"{name}_integer_seconds"] / values[f"{name}_kernels_seconds"]
        if name == "classifier" and htp.status().available:
            session = htp.session(task.network)
            start = time.perf_counter()
            htp.quietly(session.run, output, dict(task.samples[0]))
            values["classifier_htp_seconds"] = time.perf_counter() - start
            values["classifier_htp_over_integer"] = (
                values["classifier_htp_seconds"] / values["classifier_integer_seconds"]
            )
    record(sys.argv[1], values, htp.status().reason)


if __name__ == "__main__":
    main()
