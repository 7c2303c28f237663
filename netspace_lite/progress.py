"""The progress bar of everything long, in plain text that stays true in a saved notebook."""

import sys

from tqdm import tqdm

from .processes import rank


def progress_bar(total: int, what: str, show: bool = True, first: int = 0) -> tqdm:
    """A bar over ``total`` steps of ``what``, of which ``first`` are done; use it in a ``with``.

    Of several processes the first shows one.
    """
    # Drawn once a second. Jupyter queues a cell's messages while nobody reads them and drops those
    # that come after some thousand, so that ten a second lost the end of a long cell under nbval.
    # A widget's bar would be saved at 0%, and shows as that wherever widgets can't run.
    look = {"unit": "step", "desc": what, "mininterval": 1.0, "file": sys.stdout}
    return tqdm(total=total, initial=first, disable=not show or rank() > 0, **look)
