"""The probes of `doctor` that reach a bucket: from its name to the first answer."""

from email.utils import parsedate_to_datetime
import ssl
import time

from ..interfaces import MissingObjectError
from ..interfaces import PermanentS3Error
from ..interfaces import S3OperationError
from ..s3probe import FirstAnswer
from .network import Address
from .probing import FAILED
from .probing import Finding
from .probing import LACKS
from .probing import of_error
from .probing import OK
from .probing import Probe
from .probing import SKIPPED
from .probing import Subject


# Seconds between the clocks that are worth a word, and from which on signatures are refused
NOTABLE_SKEW = 30
LARGEST_SKEW = 900
# What the remedy of an error names, by the probe that it belongs to
TOPICS = {
    "clock": ("clock",),
    "missing key": ("grant",),
    "region": ("s3-region",),
    "credentials": ("s3-access-key", "s3-secret-key", "credentials", "account"),
    "bucket": ("bucket-name", "s3-create-bucket"),
}


class Reaching:
    """Finds out how far requests for a bucket come.

    :raises S3OperationError: when there are no credentials, for example.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._client, self._config = subject.client, subject.config
        self._address = Address.of(subject.client.address())
        self._first: FirstAnswer | None = None

    def probes(self) -> list[Probe]:
        """Return the probes, in their order."""
        return [
            ("name", self.name),
            ("connection", self.connection),
            ("TLS", self.tls),
            ("answer", self.answer),
            ("clock", self.clock),
            ("credentials", self.credentials),
            ("region", self.region),
            ("bucket", self.bucket),
            ("missing key", self.missing_key),
        ]

    def name(self) -> Finding:
        """Look the host up."""
        host = self._address.host
        if proxy := self._address.proxy():
            return Finding(OK, f"requests go through the proxy {proxy}, which looks it up")
        try:
            found = self._address.resolve()
        except OSError as error:
            remedy = "check s3-endpoint-url and this host's name servers"
            has_bucket = host.startswith(f"{self._client.bucket_name}.")
            if has_bucket and self._config.s3_endpoint_url:
                remedy = (
                    "where the server knows no host for each bucket, set s3-addressing-style path;"
                    f" else {remedy}"
                )
            return Finding(FAILED, f"{host} has no address: {error.strerror or error}", remedy)
        return Finding(OK, f"{host} is {', '.join(found)}")

    def connection(self) -> Finding:
        """Connect to the port."""
        address = self._address
        if address.proxy():
            return Finding(SKIPPED, "requests go through a proxy")
        begun = time.monotonic()
        try:
            address.connect(self._config.s3_connect_timeout).close()
        except OSError as error:
            return Finding(
                FAILED,
                f"nothing answers at port {address.port} of {address.host}: {error}",
                "check the host and port of s3-endpoint-url, that the server runs, and firewalls",
            )
        took = time.monotonic() - begun
        return Finding(OK, f"port {address.port} answers within {took * 1000:.0f} ms")

    def tls(self) -> Finding:
        """Compare the certificate."""
        address = self._address
        if address.scheme == "http":
            return Finding(
                LACKS,
                "requests travel unencrypted, with the blobs in them",
                "unless the network is private, give an https:// s3-endpoint-url",
            )
        if address.proxy():
            return Finding(SKIPPED, "requests go through a proxy")
        try:
            until = address.certificate(self._config.s3_connect_timeout, self._subject.ca_bundle())
        except ssl.SSLCertVerificationError as error:
            return _untrusted(error, address.host, self._client.bucket_name)
        except (ssl.SSLError, OSError) as error:
            return Finding(
                FAILED,
                f"port {address.port} of {address.host} speaks no TLS:"
                f" {getattr(error, 'reason', None) or error}",
                "check the port of s3-endpoint-url; a server without TLS needs http:// there",
            )
        return Finding(OK, f"the certificate is trusted, and valid until {until}")

    # The first answer

    def answer(self) -> Finding:
        """Ask for an object that is not there; what comes answers the next probes, too."""
        try:
            self._first = self._client.first_answer(f"{self._subject.scratch}missing")
            error = self._first.error
        except S3OperationError as raised:
            error = raised
        if self._first is None or self._topic() == "answer":
            found = of_error(error)
            remedy = found.remedy or "check s3-endpoint-url, http or https, and what stands between"
            return found._replace(remedy=remedy)
        return Finding(OK, f"an S3 server answers, with status {self._first.status}")

    def _topic(self) -> str:
        """Return which probe the first answer fails, "" when it is as it should be."""
        assert self._first is not None
        if isinstance(self._first.error, MissingObjectError):
            return ""
        remedy = of_error(self._first.error).remedy
        for topic, words in TOPICS.items():
            if isinstance(self._first.error, PermanentS3Error) and any(
                word in remedy for word in words
            ):
                return topic
        return "answer"

    def clock(self) -> Finding:
        """Compare the clocks."""
        assert self._first is not None
        try:
            there = parsedate_to_datetime(self._first.date).timestamp()
        except (TypeError, ValueError, OverflowError):
            return Finding(LACKS, "the server does not tell its time")
        skew = time.time() - there
        size = abs(skew)
        which = "ahead of" if skew > 0 else "behind"
        told = f"this host's clock is {size:.0f} s {which} the server's"
        if self._topic() == "clock" or size > LARGEST_SKEW:
            return Finding(FAILED, f"{told}: signatures are refused", "set this host's clock (NTP)")
        if size > NOTABLE_SKEW:
            return Finding(
                OK, told, "set this host's clock (NTP): from 900 s on signatures are refused"
            )
        return Finding(OK, f"the clocks differ by {size:.0f} s")

    def credentials(self) -> Finding:
        """See that they are accepted."""
        assert self._first is not None
        if self._topic() == "credentials":
            return of_error(self._first.error)
        source = "boto3's own, from the environment, its files or a role"
        if self._config.s3_access_key:
            source = "those of s3-access-key"
        elif self._config.s3_profile:
            source = "those of s3-profile"
        return Finding(OK, f"the server accepts {source}")

    def region(self) -> Finding:
        """Compare the region."""
        assert self._first is not None
        if self._topic() == "region":
            return of_error(self._first.error)
        told, configured = self._first.region, self._config.s3_region
        if not told:
            return Finding(OK, f"{configured or 'the default'} is accepted")
        if told != configured:
            return Finding(
                OK,
                f"the bucket is in {told}, s3-region is {configured or 'not set'}",
                f"set s3-region {told}: that saves a request, and makes URLs right at once",
            )
        return Finding(OK, f"the bucket is in {told}")

    def bucket(self) -> Finding:
        """See that there is one."""
        assert self._first is not None
        name = self._client.bucket_name
        if self._topic() != "bucket":
            return Finding(OK, f"{name} is there")
        if self._config.s3_create_bucket:
            return Finding(
                FAILED,
                f"there is no bucket {name} yet, so nothing else can be tried",
                "the first upload creates it, as s3-create-bucket says: run this again then",
            )
        return of_error(self._first.error)

    def missing_key(self) -> Finding:
        """See how an object that is not there is told from one that is denied."""
        assert self._first is not None
        if self._topic() != "missing key":
            return Finding(OK, f"a missing object is told as such, with {self._first.status}")
        return Finding(
            LACKS,
            f"a missing object is answered by {self._first.status}, as a denied one: reading a"
            " blob that is nowhere raises PermanentS3Error in place of POSKeyError",
            of_error(self._first.error).remedy,
        )


def _untrusted(error: ssl.SSLCertVerificationError, host: str, bucket_name: str) -> Finding:
    reason = error.verify_message or "it is not trusted"
    remedy = "name the file with the certificate, or its authority's, in s3-ca-bundle"
    if "mismatch" in reason:
        remedy = "give s3-endpoint-url the name that the certificate has"
        if host.startswith(f"{bucket_name}."):
            remedy = f"set s3-addressing-style path, or {remedy}"
    elif "expired" in reason:
        remedy = "renew the server's certificate, or set this host's clock"
    return Finding(FAILED, f"the certificate of {host} is refused: {reason}", remedy)
