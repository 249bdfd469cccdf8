import pytest

from serving.retrieval.retriever import Retriever


@pytest.fixture(scope="package")
def retriever(small):
    return Retriever.load(small.models)


@pytest.fixture(scope="package")
def tree(clustered):
    return Retriever.load(clustered.models)
