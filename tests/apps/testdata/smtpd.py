"""A mail server: smtpd.py PORT TLS-PREFIX FILE. A line of FILE for each message."""
import asyncio
import hashlib
import ssl
import sys

from aiosmtpd.smtp import SMTP

port, tls, stored = sys.argv[1:]
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(tls + ".crt", tls + ".key")


class Handler:
    async def handle_DATA(self, server, session, envelope):
        content = envelope.content
        source = "smtp-source" if b"postmail" in content or b"smtp-source" in content.lower() else "swaks"
        subject = [l for l in content.split(b"\r\n") if l.lower().startswith(b"subject:")]
        if source == "smtp-source" or not subject or b": " not in subject[0]:
            line = f"from smtp-source {len(content)}"
        else:
            line = f"{subject[0].decode()} {envelope.mail_from} {envelope.rcpt_tos} tls={session.ssl is not None}" \
                   f" {len(content)} {hashlib.sha256(content).hexdigest()}"
        with open(stored, "a") as f:
            f.write(line + "\n")
        return "250 stored"


async def main():
    def factory():
        return SMTP(Handler(), hostname="mail.test", ident="test", tls_context=context, data_size_limit=50_000_000)
    server = await asyncio.get_running_loop().create_server(factory, ["0.0.0.0", "::"], int(port), backlog=1000)
    await server.serve_forever()

asyncio.run(main())
