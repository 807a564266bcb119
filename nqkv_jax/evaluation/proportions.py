"""Shares of trials that succeed, and how sure they are."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Share:
    """`count` successes in `total` trials, which are taken to be independent."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def error(self) -> float:
        """Standard error, from the sample's own scatter; NaN for one trial."""
        if self.total < 2:
            return math.nan
        return math.sqrt(self.value * (1 - self.value) / (self.total - 1))

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 % confidence; unlike value ± error it is right near 0 and 1.

        Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
        """
        import scipy.stats  # half a second, which few who import this package need

        test = scipy.stats.binomtest(self.count, self.total)
        low, high = test.proportion_ci(confidence_level=0.95, method="wilson")
        return float(low), float(high)
