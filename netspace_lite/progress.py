"""The progress bar of everything long, in a terminal or a notebook."""

from tqdm.auto import tqdm


def progress_bar(total: int, what: str, show: bool = True, first: int = 0) -> tqdm:
    """A bar over ``total`` steps of ``what``, of which ``first`` are done; use it in a ``with``."""
    # Drawn once a second. Jupyter queues a cell's messages while nobody reads them and drops those
    # that come after some thousand, so that ten a second lost the end of a long cell under nbval.
    return tqdm(
        total=total, initial=first, unit="step", desc=what, disable=not show, mininterval=1.0
    )
