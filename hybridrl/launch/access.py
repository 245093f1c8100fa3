"""Whether strangers can reach this machine's Ray, and whether this user can reach W&B."""

import http.client
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from hybridrl.launch.finding import Finding, Level, fail, ok, warn
from hybridrl.runtime.ray_internals import dashboard_address

PROBE_S = 3.0  # timeout of a request to a dashboard


def ray_token(path: Path) -> Finding:
    """Whether others can read the token of Ray, with which they could run code as this user."""
    if not path.is_file():
        return ok("Ray token", f"none in {path} yet; Ray makes one")
    if path.stat().st_mode & 0o077:
        return fail(
            "Ray token", f"{path} can be read by other users of this machine; chmod 600 {path}"
        )
    return ok("Ray token", f"{path} is yours alone")


def dashboards() -> list[Finding]:
    """Whether the dashboards of local Ray heads, and of one in the environment, are closed."""
    addresses = sorted(set(local_dashboards(Path("/proc"))))
    local = [dashboard(host, port, answers_strangers(host, port)) for host, port in addresses]
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"):
        if os.environ.get(name):
            return [*local, named_dashboard(name, os.environ[name])]
    return local or [ok("Ray dashboard", "no Ray head here")]


def named_dashboard(name: str, address: str) -> Finding:
    """Whether the dashboard at the address in an environment variable is closed."""
    try:
        host, port, secure = host_and_port(address)
    except ValueError as error:
        return fail(
            "Ray dashboard",
            f"{name}={address}: is not an address ({error}); set it to http://HOST:PORT",
        )
    answer = answers_strangers(host, port, secure=secure)
    if answer is None:
        return warn(
            "Ray dashboard",
            f"nothing answers at {host}:{port}, which {name} names; start Ray there, or correct it",
        )
    return dashboard(host, port, answer, secure=secure)


def host_and_port(address: str) -> tuple[str, int, bool]:
    """Host and port of an address [http[s]://]HOST[:PORT], and whether it is https.

    Raises:
        ValueError: it does not have this form.
    """
    url = urlsplit(address if "//" in address else f"//{address}")
    if not url.hostname:
        raise ValueError("no host")
    secure = url.scheme == "https"
    return url.hostname, url.port or (443 if secure else 8265), secure


def local_dashboards(proc: Path) -> Iterator[tuple[str, int]]:
    """(host, port) of each dashboard process of Ray, from its command line."""
    for file in proc.glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process has ended
            continue
        address = dashboard_address(words)
        if address is not None:
            yield address


def answers_strangers(host: str, port: int, *, secure: bool = False) -> bool | None:
    """Whether the job API, which runs any command, answers without a token; None: no answer."""
    wildcard = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
    target = wildcard.get(host, host)
    connection = http.client.HTTPConnection(target, port, timeout=PROBE_S)
    if secure:  # the certificate is not verified, as no secret is sent
        connection = http.client.HTTPSConnection(
            target, port, timeout=PROBE_S, context=unverified()
        )
    try:
        connection.request("GET", "/api/jobs/")
        return connection.getresponse().status not in (401, 403)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def unverified() -> ssl.SSLContext:
    """A context that accepts any certificate, since clusters often have self-signed ones."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def dashboard(
    host: str, port: int, open_to_strangers: bool | None, *, secure: bool = False
) -> Finding:
    """Whether strangers can run commands through the dashboard at an address.

    Args:
        open_to_strangers: as answers_strangers returns it.
        secure: whether the dashboard is reached by https.
    """
    at = f"{host}:{port}"
    wide = host not in ("127.0.0.1", "localhost", "::1")
    remedy = "stop it, and start Ray with RAY_AUTH_MODE=token, as cluster/head.sh does"
    if open_to_strangers is None:
        return ok("Ray dashboard", f"nothing answers at {at}")
    if open_to_strangers and wide:
        return fail(
            "Ray dashboard", f"{at} accepts jobs from anybody who reaches this machine; {remedy}"
        )
    if open_to_strangers:
        return warn("Ray dashboard", f"{at} accepts jobs from any user of this machine; {remedy}")
    if wide and not secure:
        return Finding(
            level=Level.warn,
            name="Ray dashboard",
            text=f"{at} requires a token, which is sent unencrypted; use a tunnel to 127.0.0.1",
        )
    return ok("Ray dashboard", f"{at} requires a token")


def wandb_key() -> Finding:
    """Whether runs can be tracked online by W&B."""
    from hybridrl.tracking.wandb_sink import has_key

    if has_key():
        return ok("W&B", "a key is there, so runs are tracked online")
    return warn("W&B", "no key, so runs are tracked offline")
