"""Keeping garbage collections short and rare: at 1,000 open streams a full one takes longer than a check may.

What a request needs is freed without a collection when nothing refers to it any more, so no objects may hold each
other (a test looks).
"""

import gc


def collect_less_garbage() -> None:
    """Leave out of collections what is loaded by now, and leave full ones to quiet moments (``app.TidyServer``).

    A server that never has such a moment collects too: about each half hour at 1,000 streams.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 1000)


def forget_frames(error: BaseException | None) -> None:
    """Free what an error that has been told of holds: the frames it came through, with all that its request needed.

    Some of these hold the error's task or future, which holds the error: a circle. asyncio breaks its own likewise.
    """
    seen: set[int] = set()  # errors that several requests share may name each other as causes
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
