"""How a stretch of tokens is cut into segments, each of which is clustered on its own."""


def cut_segments(num_tokens: int, *, segment: int, smallest: int) -> list[int]:
    """Cut `num_tokens` into segment lengths, longest first, all `smallest` times a power of two.

    A function of the numbers alone: the segments are the same however the tokens came. No length
    exceeds `segment`; what does not fill `smallest` is left out.
    """
    lengths = []
    while num_tokens >= smallest:
        length = min(segment, smallest << (num_tokens // smallest).bit_length() - 1)
        lengths.append(length)
        num_tokens -= length
    return lengths
