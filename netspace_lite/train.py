"""Train what the notebooks load, with one process or many of one or more machines.

``torchrun --nproc-per-node=2 -m netspace_lite.train single``, or ``python -m`` in one process. What
is finished is loaded, what was interrupted goes on. Settings come from the environment, as in the
notebooks, and so do folders.
"""

import os
from argparse import ArgumentParser

from .processes import rank, together, wait
from .tutorial import Settings, chapters


def _zoos(settings: Settings, data) -> list:
    """The zoos of notebooks 1 and 3, whose blocks processes train side by side; no spaces."""
    chapters.single_zoo(settings, data)
    chapters.several_zoos(settings, data)
    return []


WORK = {
    "zoos": _zoos,
    "single": lambda *given: [chapters.single_space(*given, blind=b) for b in (False, True)],
    "several": lambda *given: [chapters.several_space(*given, b) for b in (False, True)],
    "shapes": lambda settings, _: [chapters.shape_space(settings)],
}


def main(arguments: list[str] | None = None) -> None:
    """Train the zoos of notebooks 1 to 4, or the zoo and the spaces of one chapter."""
    parser = ArgumentParser("python -m netspace_lite.train", description=main.__doc__)
    parser.add_argument("what", choices=WORK)
    what = parser.parse_args(arguments).what
    try:
        settings = Settings.from_environment()
    except ValueError as error:
        parser.error(str(error))
    with together():
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local:  # the first of each machine may have to download the images
            wait()
        data = None if what == "shapes" else settings.load_data()
        if not local:
            wait()
        for space, *_, history in WORK[what](settings, data):
            if rank() == 0:
                scores = ", ".join(f"{name} {value:.4g}" for name, value in history[-1].items())
                print(f"{space.architectures}: {scores}")


if __name__ == "__main__":
    main()
