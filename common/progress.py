"""Progress bars of the main process alone."""

from tqdm import tqdm

from common import processes


def progress(*arguments, hidden: bool = False, **options) -> tqdm:
    """A tqdm bar, which the other processes of a run do not show, nor this one if it is hidden. TQDM_DISABLE=1 and
    tqdm's other variables count: they are the defaults of what is not given here."""
    if hidden or not processes.is_main():
        options["disable"] = True
    return tqdm(*arguments, **options)
