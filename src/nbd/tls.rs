//! TLS by certificates, in the files that GnuTLS programs use: `ca-cert.pem`, `server-cert.pem`,
//! `server-key.pem`, `client-cert.pem` and `client-key.pem` in one directory.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

use crate::error::{Error, Result};
use crate::nbd::uri::{Address, TlsQuery};

/// Whether clients have to show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Peers {
    /// Anybody may connect.
    #[default]
    Any,
    /// Only who has a certificate that `ca-cert.pem` vouches for.
    Verified,
}

/// A server's side of TLS.
#[derive(Clone)]
pub struct Server {
    config: Arc<ServerConfig>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tls::Server")
    }
}

impl Server {
    /// With the server's certificate and key, and for `Verified` the authority, in `directory`.
    ///
    /// # Errors
    /// The host's; `Invalid` for files that do not hold what they should.
    pub fn load(directory: &Path, peers: Peers) -> Result<Self> {
        let (chain, key) = identity(directory, "server")?;
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|e| refused(directory, "cannot set up TLS", e))?;
        let builder = match peers {
            Peers::Any => builder.with_no_client_auth(),
            Peers::Verified => {
                let roots = authorities(&directory.join("ca-cert.pem"))?;
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
                        .build()
                        .map_err(|e| refused(directory, "cannot verify clients", e))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let config = builder
            .with_single_cert(chain, key)
            .map_err(|e| refused(directory, "cannot use the server's certificate", e))?;
        Ok(Self {
            config: Arc::new(config),
        })
    }

    /// One connection's side.
    ///
    /// # Errors
    /// Those of TLS.
    pub fn session(&self) -> Result<rustls::Connection> {
        let session = ServerConnection::new(Arc::clone(&self.config));
        session
            .map(Into::into)
            .map_err(|e| Error::invalid(format!("cannot start TLS: {e}")))
    }
}

/// A client's side of TLS.
#[derive(Clone)]
pub struct Client {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tls::Client({:?})", self.name)
    }
}

impl Client {
    /// For a server at `address`, with the certificates that the URI names, else the host's
    /// authorities.
    ///
    /// # Errors
    /// The host's; `Invalid` for files that do not hold what they should, and for a name that no
    /// certificate can have.
    pub fn load(query: &TlsQuery, address: &Address) -> Result<Self> {
        let name = match (&query.hostname, address) {
            (Some(name), _) => name.clone(),
            (None, Address::Tcp { host, .. }) => host.clone(),
            (None, Address::Unix(_)) => "localhost".to_owned(),
        };
        let name = ServerName::try_from(name.clone())
            .map_err(|_| Error::invalid(format!("'{name}' is no name of a TLS server")))?;
        let authority = query.certificates.as_ref().map(|d| d.join("ca-cert.pem"));
        let roots = match authority {
            Some(file) => authorities(&file)?,
            None => host_authorities()?,
        };
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|e| Error::invalid(format!("cannot verify servers: {e}")))?;
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::invalid(format!("cannot set up TLS: {e}")))?
            .with_webpki_verifier(verifier);
        let own = query.certificates.as_deref().filter(|directory| {
            // A directory without them is for servers that ask for none.
            directory.join("client-cert.pem").exists()
        });
        let config = match own {
            None => builder.with_no_client_auth(),
            Some(directory) => {
                let (chain, key) = identity(directory, "client")?;
                builder
                    .with_client_auth_cert(chain, key)
                    .map_err(|e| refused(directory, "cannot use the client's certificate", e))?
            }
        };
        Ok(Self {
            config: Arc::new(config),
            name,
        })
    }

    /// One connection's side.
    ///
    /// # Errors
    /// Those of TLS.
    pub fn session(&self) -> Result<rustls::Connection> {
        let session = ClientConnection::new(Arc::clone(&self.config), self.name.clone());
        session
            .map(Into::into)
            .map_err(|e| Error::invalid(format!("cannot start TLS: {e}")))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn refused(path: &Path, doing: &str, why: impl fmt::Display) -> Error {
    Error::invalid(format!("{doing}: {why}")).at(path)
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(directory: &Path, whose: &str) -> Result<Identity> {
    let chain = certificates(&directory.join(format!("{whose}-cert.pem")))?;
    let file = directory.join(format!("{whose}-key.pem"));
    let pem = read(&file)?;
    let key =
        PrivateKeyDer::from_pem_slice(&pem).map_err(|e| refused(&file, "has no private key", e))?;
    Ok((chain, key))
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let pem = read(file)?;
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(Error::invalid("holds no certificate (wanted: PEM)").at(file)),
        Err(e) => Err(refused(file, "holds no certificate", e)),
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).map_err(|e| Error::io("read", e).at(file))
}

fn authorities(file: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(file)? {
        roots
            .add(certificate)
            .map_err(|e| refused(file, "holds a certificate that cannot vouch for others", e))?;
    }
    Ok(roots)
}

/// What the host trusts; certificates that cannot be used are left out, as everybody does.
fn host_authorities() -> Result<RootCertStore> {
    const PLACES: [&str; 4] = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/ca-bundle.pem",
        "/etc/ssl/cert.pem",
    ];
    let named = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let place = named.or_else(|| PLACES.iter().map(PathBuf::from).find(|p| p.exists()));
    let Some(place) = place else {
        return Err(Error::invalid(
            "this host has no list of certificate authorities (tls-certificates=DIR in the URI \
             names a directory with ca-cert.pem)",
        ));
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates(&place)?);
    Ok(roots)
}
