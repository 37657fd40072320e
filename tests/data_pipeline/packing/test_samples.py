from data_pipeline.packing.samples import index_in_plan


def test_the_order_of_samples_is_frozen():
    assert [index_in_plan(index, num_samples=6, seed=11) for index in range(12)] == [2, 4, 5, 1, 0, 3, 5, 1, 4, 3, 2, 0]
