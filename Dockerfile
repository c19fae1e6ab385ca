# The image of all three processes in the Procfile: the command says which one a container is.
FROM python:3.11-slim AS build
WORKDIR /src
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/clerk-sync
COPY requirements.txt ./
RUN /opt/clerk-sync/bin/pip install --require-hashes -r requirements.txt
COPY pyproject.toml README.md LICENSE clerk_sync.py config.py ./
COPY cli ./cli
COPY db ./db
COPY migrations ./migrations
COPY web ./web
COPY worker ./worker
# What only builds does not go into the image
RUN /opt/clerk-sync/bin/pip install --no-deps --no-build-isolation . && \
    /opt/clerk-sync/bin/pip uninstall --yes setuptools pip

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin clerk-sync
COPY --from=build /opt/clerk-sync /opt/clerk-sync
ENV PATH=/opt/clerk-sync/bin:$PATH PYTHONUNBUFFERED=1
USER clerk-sync
EXPOSE 8000
# For the receiver; the other processes have no port (compose.yaml turns it off for them)
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('PORT', '8000') + '/health/live', timeout=4)"]
CMD ["clerk-sync", "web"]
