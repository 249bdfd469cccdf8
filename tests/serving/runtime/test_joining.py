import numpy as np

from serving.runtime.joining import join, pieces, split


def arrays(rows, start):
    return {
        "number": np.arange(start, start + 2 * rows, dtype=np.float32).reshape(rows, 2),
        "name": np.array([b"%d" % row for row in range(start, start + rows)], object),
    }


def test_what_is_joined_is_split_again_without_a_copy():
    parts = [arrays(3, 0), arrays(0, 7), arrays(2, 20)]
    joined = join(parts)
    assert joined["number"].shape == (5, 2)
    back = split(joined, [3, 0, 2])
    for part, again in zip(parts, back, strict=True):
        for name, array in part.items():
            np.testing.assert_array_equal(again[name], array)
            assert again[name].base is joined[name]


def test_one_part_stays_as_it_is():
    part = arrays(3, 0)
    assert join([part]) is part


def test_pieces_are_joined_to_the_whole():
    whole = arrays(7, 0)
    parts = list(pieces(whole, 3))
    assert [len(part["name"]) for part in parts] == [3, 3, 1]
    for name, array in join(parts).items():
        np.testing.assert_array_equal(array, whole[name])
