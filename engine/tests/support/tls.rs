//! TLS for tests: both ends' configurations, with certificates that were made for them. Their key is no secret.

use std::sync::Arc;

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
    server::WebPkiClientVerifier,
};

/// Both ends have the same.
fn identity() -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let certificate = include_bytes!("tls/leaf.der").as_slice();
    let key = include_bytes!("tls/leaf.pk8").as_slice();
    (
        vec![certificate.into()],
        PrivatePkcs8KeyDer::from(key).into(),
    )
}

fn roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots
        .add(include_bytes!("tls/ca.der").as_slice().into())
        .unwrap();
    roots
}

/// The server's name.
pub fn name() -> ServerName<'static> {
    "localhost".try_into().unwrap()
}

/// The client's and the server's, each of which asks for the other's certificate.
pub fn configs() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls13 = &[&rustls::version::TLS13];
    let (chain, key) = identity();
    let mut client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(tls13)
        .unwrap()
        .with_root_certificates(roots())
        .with_client_auth_cert(chain, key)
        .unwrap();
    let (chain, key) = identity();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots()), provider.clone());
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(tls13)
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(chain, key)
        .unwrap();
    assert!(server.send_tls13_tickets > 0);
    client.enable_secret_extraction = true;
    server.enable_secret_extraction = true;
    (Arc::new(client), Arc::new(server))
}
