import pytest

import towers
from towers.metrics.held_out import HeldOut


def test_a_table_of_a_model_and_popularity(data, pairs):
    model = towers.TwoTower(data, dim=8)
    table = towers.evaluate(model, data, ks=(3, 7))
    assert list(table.columns) == ["model", "model_ci95", "popularity", "popularity_ci95"]
    held_out = HeldOut(data, "test")
    embeddings = model.query_embeddings(), model.candidate_embeddings()
    means, half_widths = held_out.measure(*embeddings, (3, 7))
    assert table["model"].to_dict() == means
    assert table["model_ci95"].to_dict() == half_widths
    assert table["popularity"].to_dict() == held_out.measure_popularity((3, 7))[0]
    assert (table.loc["recall@7"] > 0).all()
    other = towers.evaluate(model, data, split="validation", ks=3)
    assert other.loc["recall@3", "model"] != table.loc["recall@3", "model"]


@pytest.mark.parametrize("ks", [(), (0,), (5.0,), "10"])
def test_wrong_cut_offs_are_told_before_an_epoch(data, ks):
    with pytest.raises(ValueError, match=r"^ks must be whole numbers of at least 1, as in"):
        towers.evaluate(towers.TwoTower(data, dim=4), data, ks=ks)
    with pytest.raises(ValueError, match=r"^ks must be whole numbers of at least 1, as in"):
        towers.FullCorpusMetrics(data, ks=ks)


def test_other_data_are_an_error(data, pairs):
    others = towers.from_dataframe(pairs.iloc[1:], user="user_id", item="item_id")
    with pytest.raises(ValueError, match="the model was trained on other data"):
        towers.evaluate(towers.TwoTower(data, dim=4), others)
    with pytest.raises(ValueError, match="split must be test or validation, got 'train'"):
        towers.evaluate(towers.TwoTower(data, dim=4), data, split="train")
    with pytest.raises(ValueError, match="split must be test or validation, got 'train'"):
        towers.FullCorpusMetrics(data, "train")
    whole = towers.from_dataframe(pairs, user="user_id", item="item_id", train_ratio=1.0)
    with pytest.raises(ValueError, match="no test rows"):
        towers.evaluate(towers.TwoTower(whole, dim=4), whole)
