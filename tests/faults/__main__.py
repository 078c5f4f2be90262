"""The fault suite: what must hold when something fails, with how often it was tried.

    python -m tests.faults                       # a tenth of every goal
    python -m tests.faults --long                # all of it
    python -m tests.faults --only G1,G5 --seed 7

Prints a line a goal; exit code 1 when one does not hold.
"""

import argparse
import importlib
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.faults.figures import Figures

GOALS = {  # goal -> module with run(budget, seed, folder) -> Figures
    "G1": "kills",
    "G2": "corrupt",
    "G3": "poison",
    "G4": "bad_input",
    "G5": "exact_resume",
    "G6": "nonfinite",
    "G7": "hangs",
    "G8": "signals",
    "G9": "secrets",
    "G10": "cost",
}


def main() -> int:
    arguments = parse_arguments()
    root = arguments.keep or Path(tempfile.mkdtemp(prefix="faults_", dir=fast_folder()))
    print(f"budget {arguments.budget:g} of the full counts, seed {arguments.seed}, in {root}")
    results = []
    try:
        for goal in arguments.only:
            result, seconds = run_goal(goal, arguments.budget, arguments.seed, root)
            results.append(result)
            print(f"{result.describe()} ({seconds:.0f} s)", flush=True)
            if arguments.keep is None and result.ok:
                shutil.rmtree(root / goal, ignore_errors=True)
    finally:
        if arguments.keep is None and all(result.ok for result in results):
            shutil.rmtree(root, ignore_errors=True)
    failed = [result.goal for result in results if not result.ok]
    print(f"{len(results) - len(failed)} of {len(results)} goals hold", end="")
    print(f"; not {', '.join(failed)}; see {root}" if failed else "")
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--budget", type=float, default=0.1, help="share of the full counts")
    parser.add_argument("--long", action="store_const", const=1.0, dest="budget", help="all of it")
    parser.add_argument("--only", type=goals, default=list(GOALS), metavar="G1,G2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a new folder, kept with all that the runs wrote")
    return parser.parse_args()


def goals(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(GOALS):
        raise argparse.ArgumentTypeError(f"{min(unknown)}; expected some of {','.join(GOALS)}")
    return names


def fast_folder() -> str | None:
    """Memory, where it holds enough: the runs sync thousands of small files."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 4 << 30:
        return str(memory)
    return None


def run_goal(goal: str, budget: float, seed: int, root: Path) -> tuple[Figures, float]:
    """A goal's figures and seconds; what it raises is a failure of it."""
    folder, began = root / goal, time.monotonic()
    folder.mkdir(parents=True)
    try:
        module = importlib.import_module(f"tests.faults.{GOALS[goal]}")
        result = module.run(budget, seed, folder)
    except Exception as error:
        traceback.print_exc()
        wrong = f"the suite itself: {type(error).__name__}: {error}"
        result = Figures(goal=goal, title=GOALS[goal], counts={}, failures=[wrong])
    return result, time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
