//! The host objects that a disk is made of.
//!
//! Nothing that is made anew may take the place of one of them.  Whoever puts a file somewhere asks
//! here, and only here, so that a format of many files is safe everywhere once [`Image::parts`]
//! lists them.
//!
//! [`Image::parts`]: crate::image::Image::parts

use std::path::{Path, PathBuf};

use crate::chain::Chain;
use crate::image::Role;
use crate::nbd::uri::is_uri;
use crate::storage::HostId;

/// One host object of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFile {
    /// The layer's place in its chain; 0 is the top.
    pub layer: usize,
    /// What it is to the layer's image.
    pub role: Role,
    /// As messages show it; the URI of what a server has; `None` for memory.
    pub path: Option<PathBuf>,
    /// Which object it is; `None` for memory and for what a server has.
    pub id: Option<HostId>,
    /// As messages show the object that holds the image's header.
    pub image: Option<PathBuf>,
}

impl HostFile {
    /// An image that is not open, so that nothing but its name is known.
    pub fn named(path: &Path) -> Self {
        Self {
            layer: 0,
            role: Role::Header,
            path: Some(path.to_owned()),
            id: HostId::named(path),
            image: Some(path.to_owned()),
        }
    }

    /// Whether it is the object `id`, or, where a server has it, what `path` names.
    pub fn is_same(&self, id: Option<HostId>, path: &Path) -> bool {
        match is_uri(path) {
            true => self.path.as_deref() == Some(path),
            false => id.is_some() && self.id == id,
        }
    }
}

impl Chain {
    /// All host objects of all its layers, as far as they are open, top first.
    pub fn files(&self) -> Vec<HostFile> {
        let layers = self.layers().iter().enumerate();
        let files = layers.flat_map(|(layer, image)| {
            let header = image.storage().path().map(Path::to_owned);
            image.parts().into_iter().map(move |part| HostFile {
                layer,
                role: part.role,
                path: part.storage.path().map(Path::to_owned),
                id: part.storage.host_id(),
                image: header.clone(),
            })
        });
        files.collect()
    }
}
