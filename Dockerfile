# Two images from one file: the viewer image carries no torch.
FROM python:3.11-slim AS base
RUN useradd --create-home kvtrace && mkdir /traces && chown kvtrace /traces
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY schemas schemas
COPY recorder recorder
COPY viewer viewer
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
ENTRYPOINT ["kvtrace"]

# The demo records and then replays, so this image has the replay's numba too; the CPU build of
# torch comes from its own index, because the one on PyPI brings CUDA.
FROM base AS recorder
RUN pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu \
    '.[recorder,viewer]'
USER kvtrace

FROM base AS viewer
RUN pip install -c constraints.txt '.[viewer]'
USER kvtrace
