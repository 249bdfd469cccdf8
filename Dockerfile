# Untested: neither Docker nor a GPU was at hand. The driver of the GPU is the host's.
#   docker build -t twotower .
#   docker run --rm --gpus all twotower                       the doctor, which says on which device a step ran
#   docker run --rm --gpus all -v "$PWD:/work" -w /work twotower train --data prepared --run run
FROM python:3.11-slim
WORKDIR /twotower
COPY requirements-gpu.lock .
RUN pip install --no-cache-dir --require-hashes -r requirements-gpu.lock
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
ENTRYPOINT ["twotower"]
CMD ["doctor"]
