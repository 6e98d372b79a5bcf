"""timm's own train.py and validate.py, unmodified, on digits: killed in the terminal phase, resumed, validated.

The scripts are in timm's repository, not in its package: give their paths.

    python examples/integrations/timm_digits.py TRAIN_PY [VALIDATE_PY] [--out FOLDER] [--quick]
"""

import argparse
import subprocess
import sys
from pathlib import Path

from digits import write_folder


def run(*command: str) -> None:
    """Show a command and run it."""
    print("$", " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def run_and_kill(*command: str) -> None:
    """Kill the run after the second epoch of its terminal phase; what it prints is shown."""
    print("$", " ".join(command), flush=True)
    pipe, terminal = subprocess.PIPE, 0
    with subprocess.Popen([sys.executable, *command], stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            terminal += line.rstrip().endswith("(terminal)")
            if terminal == 2:
                process.kill()
                break
    if terminal < 2:
        raise SystemExit(f"the run ended with code {process.returncode} before its terminal phase")


def main(argv: list[str] | None = None) -> None:
    """Write the images, kill the run in its terminal phase, go on to the end, validate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("train", type=Path, metavar="TRAIN_PY", help="timm's train.py")
    parser.add_argument("validate", type=Path, metavar="VALIDATE_PY", nargs="?", help="timm's validate.py")
    parser.add_argument("--out", type=Path, default=Path("runs/timm_digits"), help="folder of images and checkpoints")
    parser.add_argument("--quick", action="store_true", help="few images, few epochs")
    args = parser.parse_args(argv)
    train_size, epochs = (400, 6) if args.quick else (1400, 10)
    data = write_folder(args.out / "images", train_size)
    phase = {"max_epochs": 3 * epochs, "min_terminal": 2, "threshold": 0.9 if args.quick else 0.995}
    terms = {"IntraClassCosineLoss": {"weight": 0.5, "phase": "terminal"}}
    model = ["--model", "ncreg_etf.test_resnet", "--num-classes", "10", "--input-size", "3", "32", "32"]
    model += ["--device", "cpu", "--data-dir", str(data)]
    extra = ["--model-kwargs", f"terminal_phase={phase}", f"loss_terms={terms}"]
    loop = ["--epochs", str(epochs), "--lr", "0.05", "--warmup-epochs", "0", "--batch-size", "50"]
    loop += ["--weight-decay", "5e-4", "--scale", "1.0", "1.0", "--hflip", "0.0", "--output", str(args.out)]
    command = [str(args.train), "--device-modules", "ncreg.integrations.timm", *model, *extra, *loop]
    command += ["--experiment", "etf"]
    run_and_kill(*command)
    last = args.out / "etf" / "last.pth.tar"
    run(*command, "--resume", str(last))
    if args.validate is not None:
        run("-m", "ncreg.integrations.timm", str(args.validate), *model, "--checkpoint", str(last))


if __name__ == "__main__":
    main()
