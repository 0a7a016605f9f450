"""SIGTERM and SIGINT as a wish to stop, fulfilled between two steps."""

import signal
from types import FrameType

import jax
import numpy as np


class StopRequest:
    """While entered, a first SIGTERM or SIGINT is remembered; a second SIGINT interrupts."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread (a notebook's helper): signals stay as they are
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        print(f"{self.signal.name}: the step under way is finished and saved", flush=True)

    def agreed(self) -> bool:
        """Whether any process was asked to stop. All processes must ask at the same step."""
        if jax.process_count() == 1:
            return self.signal is not None
        from jax.experimental import multihost_utils

        asked = np.asarray(self.signal is not None)
        return bool(np.any(multihost_utils.process_allgather(asked)))
