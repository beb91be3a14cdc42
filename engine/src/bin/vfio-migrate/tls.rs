//! Who may connect: TLS 1.3 on every connection, and certificates on both sides.
//!
//! ```text
//!   --tls-cert, --tls-key, --tls-ca ─▶ Client: shows its own, checks the server's, and its name
//!                                   └▶ Server: shows its own, asks for the client's, and its name
//! ```
//!
//! Whoever connects is the client. A client knows the name that the server's certificate must have: `--tls-peer`,
//! or the host that it connects to. A server has no such name unless it is given some: then it takes every client of
//! the authority. rustls checks a certificate within the handshake, so the peer is told what is wrong with its own.
//!
//! No session is resumed: each connection's certificate is looked at. Where the kernel has TLS, it serves the
//! multifd channels: keys are let out of rustls for that alone.
//!
//! The command's main thread makes these from the options, before it connects or listens.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, anyhow, bail, ensure};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig,
    SignatureScheme,
    client::{Resumption, verify_server_name},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    version::TLS13,
};
use vfio_migration::KernelTlsStream;

use crate::network::Address;

/// Who may connect to a command that listens.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct WhoArgs {
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// Without TLS, listen where other hosts may connect
    #[arg(long, conflicts_with = "tls_cert")]
    pub(crate) insecure: bool,
}

/// TLS on every connection of a command, or of one side of a relay.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct TlsArgs {
    /// This side's certificate, and what leads to the authority: a PEM file. With it every connection is TLS 1.3,
    /// and both sides need a certificate
    #[arg(long, value_name = "FILE", requires = "tls_key", requires = "tls_ca")]
    tls_cert: Option<PathBuf>,
    /// The key of the certificate: a PEM file
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// The authority whose certificates are taken: a PEM file
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_ca: Option<PathBuf>,
    /// A name of the peer: DNS name or IP address, as its certificate has it (subjectAltName) [default: where
    /// this side connects, the host of ADDR; where it listens, any]
    #[arg(long, value_name = "NAME", requires = "tls_cert", value_parser = name)]
    tls_peer: Vec<ServerName<'static>>,
}

/// As [`TlsArgs`], for the side of a relay that connects.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ToTlsArgs {
    /// As --tls-cert, towards the destination. The two sides are apart: each can have TLS by itself
    #[arg(
        long,
        value_name = "FILE",
        requires = "to_tls_key",
        requires = "to_tls_ca"
    )]
    to_tls_cert: Option<PathBuf>,
    /// The key of that certificate
    #[arg(long, value_name = "FILE", requires = "to_tls_cert")]
    to_tls_key: Option<PathBuf>,
    /// The authority whose certificates are taken from the destination
    #[arg(long, value_name = "FILE", requires = "to_tls_cert")]
    to_tls_ca: Option<PathBuf>,
    /// The destination's name, as its certificate has it [default: the host of --to]
    #[arg(long, value_name = "NAME", requires = "to_tls_cert", value_parser = name)]
    to_tls_peer: Option<ServerName<'static>>,
}

impl From<ToTlsArgs> for TlsArgs {
    fn from(to: ToTlsArgs) -> Self {
        Self {
            tls_cert: to.to_tls_cert,
            tls_key: to.to_tls_key,
            tls_ca: to.to_tls_ca,
            tls_peer: to.to_tls_peer.into_iter().collect(),
        }
    }
}

fn name(text: &str) -> Result<ServerName<'static>, String> {
    ServerName::try_from(text.to_owned())
        .map_err(|_| "a name is a DNS name or an IP address".into())
}

/// What a side shows, and what it takes.
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: RootCertStore,
    provider: Arc<CryptoProvider>,
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let read = || -> anyhow::Result<_> {
        let found = CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>()?;
        ensure!(!found.is_empty(), "there is no certificate in it");
        Ok(found)
    };
    read().with_context(|| format!("cannot use {}", path.display()))
}

impl TlsArgs {
    fn identity(&self) -> anyhow::Result<Option<Identity>> {
        let (Some(cert), Some(key), Some(ca)) = (&self.tls_cert, &self.tls_key, &self.tls_ca)
        else {
            return Ok(None);
        };
        let cannot = |path: &Path| format!("cannot use {}", path.display());
        let mut roots = RootCertStore::empty();
        for root in certificates(ca)? {
            roots.add(root).with_context(|| cannot(ca))?;
        }
        Ok(Some(Identity {
            chain: certificates(cert)?,
            key: PrivateKeyDer::from_pem_file(key).with_context(|| cannot(key))?,
            roots,
            provider: Arc::new(ring::default_provider()),
        }))
    }

    /// For the side that connects to `address`; none without TLS.
    pub(crate) fn client(&self, address: &Address) -> anyhow::Result<Option<Client>> {
        let Some(identity) = self.identity()? else {
            return Ok(None);
        };
        let name = match (&self.tls_peer[..], address) {
            ([name], _) => name.clone(),
            ([], Address::Tcp(address)) => {
                let host = address.rsplit_once(':').map_or("", |(host, _)| host);
                let host = host.trim_matches(['[', ']']);
                name(host).map_err(|why| anyhow!("{host}: {why}: see --tls-peer"))?
            }
            ([], Address::Unix(_)) => {
                bail!("a unix socket has no name that a certificate could have: see --tls-peer")
            }
            _ => bail!("a destination has one name: --tls-peer once"),
        };
        let mut config = ClientConfig::builder_with_provider(identity.provider)
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(identity.roots)
            .with_client_auth_cert(identity.chain, identity.key)
            .context("cannot use --tls-cert and --tls-key")?;
        config.resumption = Resumption::disabled();
        config.enable_secret_extraction = KernelTlsStream::is_available();
        Ok(Some(Client {
            config: Arc::new(config),
            name,
        }))
    }

    /// For the side that listens; none without TLS.
    pub(crate) fn server(&self) -> anyhow::Result<Option<Arc<ServerConfig>>> {
        let Some(identity) = self.identity()? else {
            return Ok(None);
        };
        let roots = Arc::new(identity.roots);
        let provider = identity.provider;
        let authority = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .context("cannot use --tls-ca")?;
        let verifier = NamedClients {
            authority,
            names: self.tls_peer.clone(),
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(identity.chain, identity.key)
            .context("cannot use --tls-cert and --tls-key")?;
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = KernelTlsStream::is_available();
        Ok(Some(Arc::new(config)))
    }
}

/// The side that connects.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) config: Arc<ClientConfig>,
    /// What the server's certificate must say.
    pub(crate) name: ServerName<'static>,
}

/// Takes the authority's certificates, of clients with one of these names where there are any.
#[derive(Debug)]
struct NamedClients {
    authority: Arc<dyn ClientCertVerifier>,
    names: Vec<ServerName<'static>>,
}

impl ClientCertVerifier for NamedClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.authority.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .authority
            .verify_client_cert(certificate, intermediates, now)?;
        let parsed = ParsedCertificate::try_from(certificate)?;
        let mut refusal = None;
        for name in &self.names {
            match verify_server_name(&parsed, name) {
                Ok(()) => return Ok(verified),
                Err(error) => refusal = Some(error),
            }
        }
        refusal.map_or(Ok(verified), Err)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, Error> {
        self.authority
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, Error> {
        self.authority
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.authority.supported_verify_schemes()
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
