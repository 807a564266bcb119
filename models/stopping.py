"""From tokens to text, one sequence, as far as the text is certain and no stop string has come."""

from collections.abc import Sequence

from nqkv_jax.models.tokenizer import Tokenizer


class TextWriter:
    """The text of a sequence that grows token by token.

    The pieces that `push` and `finish` return, put together, are the text up to the first stop
    string, which is not part of it. Text that may be the beginning of a stop string is held back
    until the next tokens tell.

    Args:
      tokenizer: of the model.
      prompt: token ids that come before; their text is not returned.
      stop: strings at which the text ends; matched across token boundaries.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._decoder = tokenizer.stream()
        # Some tokenizers drop the space before the first word of a text; after a prompt it is none.
        self._decoder.push(*prompt)
        self._stop = tuple(stop)
        self._pieces: list[str] = []
        self._held = ""
        self.stopped = False

    @property
    def text(self) -> str:
        """All that was returned so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """Takes the next token; gives the text that is certain now, perhaps none."""
        return "" if self.stopped else self._take(self._decoder.push(token))

    def finish(self) -> str:
        """The text that was held back, at the end of the sequence."""
        if self.stopped:
            return ""
        piece = self._take(self._decoder.flush())
        if not self.stopped:
            piece += self._release(len(self._held))
        return piece

    def _take(self, new: str) -> str:
        self._held += new
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._doubtful())

    def _doubtful(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stop):
                return count
        return 0

    def _release(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self._pieces.append(piece)
        return piece
