"""The demo: develop a network on the digits 0 to 4, then learn 5 to 9 from 5 examples each, with and without what it learned.

It does what these three commands do, and ends with a table:

    fromzero train recipes/digits.yaml
    fromzero train recipes/digits-finetune.yaml
    fromzero train recipes/digits-finetune.yaml name=digits-zero model=models/seed_cnn.py:SeedCNN freeze=none
"""

import sys
from pathlib import Path

import fromzero as fz

RECIPES = Path(__file__).resolve().parent
FROM_ZERO = ["name=digits-zero", "model=models/seed_cnn.py:SeedCNN", "freeze=none"]


def main() -> int:
    print("1 of 3  develop: the digits 0 to 4, from zero", flush=True)
    first = fz.run(fz.plan(fz.read(RECIPES / "digits.yaml"), beside=RECIPES))
    print("\n2 of 3  fine-tune: 5 examples each of 5 to 9, convolutions frozen", flush=True)
    base = f"model=run:{first.folder.name}"
    second = fz.run(fz.plan(fz.read(RECIPES / "digits-finetune.yaml", base, "evaluate.every=15"), beside=RECIPES))
    print("\n3 of 3  the same 25 examples from zero", flush=True)
    third = fz.run(fz.plan(fz.read(RECIPES / "digits-finetune.yaml", *FROM_ZERO, "evaluate.every=15"), beside=RECIPES))

    print(f"\n{'run':<20}{'untouched digits':>17}{'seconds':>9}{'trainable':>12}{'parameters':>12}")
    for outcome in (first, second, third):
        r = outcome.result
        print(
            f"{r['run']:<20}{r['validation']['accuracy']:>16.1%}{r['seconds']:>10.1f}{r['trainable_parameters']:>12,}{r['parameters']:>12,}"
        )
    gain = 100 * (second.result["validation"]["accuracy"] - third.result["validation"]["accuracy"])
    name, tool = second.folder.name, Path(sys.executable).parent / "fromzero"
    shown = tool.relative_to(Path.cwd()) if tool.is_relative_to(Path.cwd()) else tool
    print(f"\nWhat was learned on 0 to 4 is worth {gain:+.1f} points on 5 to 9 here; docs/transfer.md says when it is not.\n")
    print(f"predict       {shown} predict run:{name} FOLDER_OF_IMAGES")
    print(f"evaluate      {shown} evaluate run:{name}")
    print(f"curves        {shown} runs {name}   or open {second.folder / 'page.html'}")
    print(f"go on         {shown} new YOUR_DATA.csv > mine.yaml; {shown} train mine.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
