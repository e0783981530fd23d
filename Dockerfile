# The service and the trainer in one image: syncbn-serve, which is the default, syncbn-train,
# syncbn-runs and syncbn-keys.
#
#   docker build --tag syncbn:local .
#
# It has torch for the CPU. With CUDA it is some 5 GB larger:
#
#   docker build --build-arg TORCH_INDEX= --tag syncbn:cuda .

FROM python:3.11.15-slim-trixie AS base


# All that the project depends on, in a layer that changes only when a version does.
FROM base AS dependencies
# Where pip looks besides PyPI, whose torch for x86-64 brings CUDA with it. What is found here is
# the same version with +cpu after it, which pip prefers.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_EXTRA_INDEX_URL=${TORCH_INDEX} \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY pyproject.toml .ci/constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && python -m venv --without-pip /opt/syncbn \
    && pip --python /opt/syncbn/bin/python install --constraint constraints.txt --requirement requirements.txt


# The wheel, with the native kernels, for which it takes a compiler.
FROM base AS wheel
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
# Debian's mirrors have one version of g++, so none is named here.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY .ci/constraints.txt ./
RUN pip install --constraint constraints.txt hatchling
COPY pyproject.toml README.md ./
COPY docs/LICENSE docs/
COPY conf conf
COPY syncbn syncbn
COPY service service
# CXX names the compiler, so that a wheel without kernels is not made in silence.
RUN CXX=g++ pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
    && ls /dist/*-linux_*.whl


FROM base
# A fixed number, so that volumes fit and Kubernetes can see that it is not root. Volumes that are
# mounted on these directories for the first time take over their owner.
RUN groupadd --gid 10001 syncbn \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp syncbn \
    && install --directory --owner syncbn --group syncbn /models /jobs /runs /keys
COPY --from=dependencies /opt/syncbn /opt/syncbn
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip --disable-pip-version-check --python /opt/syncbn/bin/python install --no-cache-dir --no-deps /dist/*.whl

# Everything that is written goes to these directories and to /tmp; the rest may be read-only.
ENV PATH=/opt/syncbn/bin:$PATH \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONUNBUFFERED=1 \
    SYNCBN_MODELS=/models \
    SYNCBN_HOST=0.0.0.0 \
    SYNCBN_PORT=8000
# Training's default run directory, runs/, is /runs from here.
WORKDIR /
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# urllib would send the request to a proxy, if the container has one.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; server = http.client.HTTPConnection('127.0.0.1', int(os.environ['SYNCBN_PORT']), timeout=4); server.request('GET', '/v2/health/ready'); sys.exit(server.getresponse().status != 200)"]
# No ENTRYPOINT: `docker run IMAGE syncbn-train …` trains.
CMD ["syncbn-serve"]
