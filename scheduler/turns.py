"""Turn by turn: what lets a load's turns (see `device.turns`) be read one after the other."""

from __future__ import annotations

from weightstream.device.turns import Turn, Turns

__all__ = ["TurnByTurn"]


class TurnByTurn:
    """Says which tensors may be read, and which turns are complete.

    The plan has the chunks of a turn one behind the other, and behind those of none; they are granted in its order. So a
    turn that has begun needs nothing that waits for it: neither a chunk that is admitted only after it, nor one of another
    turn. The first one begins when all that is in no turn has been placed: hooks may look at it.

    Args:
        turns: what they are.
        num_places: how many places are told to `completed` in all.
    """

    def __init__(self, turns: Turns, num_places: int) -> None:
        self._turns = turns.turns
        self._of = turns.of
        self._num_others_left = num_places - len(turns.of)
        self._left = [len(turn.places) for turn in turns.turns]
        #: Set by `admit`, with the flow's lock held; cleared by `end`, on the load's thread, which wakes readers then. One
        #: that has looked just before waits until it is woken; and no chunk of the turn that ends is still to be admitted.
        self._current: int | None = None

    def admit(self, place: int) -> bool:
        """Say whether a chunk that begins with this place may be read now. Called with the flow's lock held."""
        turn = self._of.get(place)
        if turn is None or turn == self._current:
            return True
        if self._current is not None or self._num_others_left:
            return False
        self._current = turn
        return True

    def completed(self, places: list[int]) -> list[Turn]:
        """Note tensors that are there; return the turns whose last ones these were."""
        done: list[Turn] = []
        for place in places:
            turn = self._of.get(place)
            if turn is None:
                self._num_others_left -= 1
            else:
                self._left[turn] -= 1
                if not self._left[turn]:
                    done.append(self._turns[turn])
        return done

    def end(self) -> None:
        """Note that the memory of the turn that was read last has been let go."""
        self._current = None
