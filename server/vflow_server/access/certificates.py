"""TLS: the certificate of the service, and the roots of the certificates that it accepts from callers."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from vflow_server.access.watched_files import WatchedFiles


@dataclass(frozen=True)
class CertificateFiles:
    """PEM files.

    Attributes:
        certificate: the service's certificate, followed by the intermediate ones.
        key: the private key of the certificate.
        client_ca: roots of the certificates that callers must present; None: callers need no certificate.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for a gRPC server. When the files change, new connections use the new content.

        Raises:
            OSError: a file cannot be read.
            ValueError: the content of a file is not valid, or the key does not match the certificate.
        """
        files = [file for file in (self.certificate, self.key, self.client_ca) if file is not None]
        watched = WatchedFiles(files, self._read)
        return grpc.dynamic_ssl_server_credentials(
            watched.current(), watched.current, require_client_authentication=self.client_ca is not None
        )

    def _read(self) -> grpc.ServerCertificateConfiguration:
        self.check()  # gRPC accepts invalid files, and then refuses every caller without a message
        return grpc.ssl_server_certificate_configuration(
            [(self.key.read_bytes(), self.certificate.read_bytes())],
            root_certificates=None if self.client_ca is None else self.client_ca.read_bytes(),
        )

    def check(self) -> None:
        """Read the files, and see whether they are what they must be.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is not what it must be, or the key is not the certificate's.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for file in (self.certificate, self.key, self.client_ca):
            if file is not None:
                _readable(file)
        try:
            # A password, so that OpenSSL does not ask for one at the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except ssl.SSLError as error:
            raise ValueError(
                f"{self.certificate} and {self.key} are not a certificate and its unencrypted private key in PEM "
                f"({error.reason or error})"
            ) from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except ssl.SSLError as error:
                raise ValueError(f"{self.client_ca} holds no certificates in PEM ({error.reason})") from None


def _readable(file: Path) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error.strerror}") from None
