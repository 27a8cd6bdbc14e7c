//! Paths of the image below a new one.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::chain::open::Home;
use crate::cli::removed::parent;
use crate::cli::target::look;
use crate::error::{Error, Result};
use crate::formats;
use crate::image::create::CreateBacking;
use crate::image::{Driver, Image};
use crate::nbd::uri::is_uri;

/// The directory from which a new image at `file` names others.
pub(super) fn home_of_new(file: &Path) -> Result<Home> {
    Home::of_new(&look(file)?.0)
}

/// `path` without symbolic links and `..` on the way to its last part, where it leads anywhere.
pub(super) fn clean(path: &Path) -> PathBuf {
    match (std::fs::canonicalize(parent(path)), path.file_name()) {
        (Ok(parent), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    }
}

/// Where the image below a new one is: an absolute path, or an NBD URI as it is.
pub(super) fn locate(home: &Home, name: &OsStr) -> PathBuf {
    match is_uri(Path::new(name)) {
        true => name.into(),
        false => clean(&home.path().join(name)),
    }
}

/// When the file at `path` was last changed; of what a server has nobody knows.
pub(super) fn modified(path: &Path) -> std::io::Result<SystemTime> {
    match is_uri(path) {
        true => Ok(SystemTime::UNIX_EPOCH),
        false => std::fs::metadata(path).and_then(|m| m.modified()),
    }
}

/// When an open image was last changed.
fn last_change(image: &dyn Image, path: &Path) -> std::io::Result<SystemTime> {
    match image.storage().fd() {
        Some(fd) => File::from(fd.try_clone_to_owned()?).metadata()?.modified(),
        None => modified(path),
    }
}

/// Refuses a URI as the name of the image below, in formats that know only files.
pub(super) fn refuse_uri(driver: &Driver, name: &OsStr) -> Result<()> {
    match is_uri(Path::new(name)) && !driver.names_uris {
        true => Err(Error::unsupported(format!(
            "images of format '{}' can name only files as their backing image (allowed for NBD \
             URIs: {})",
            driver.name,
            formats::names(|driver| driver.names_uris)
        ))),
        false => Ok(()),
    }
}

/// The way from `directory` to `path`; both are absolute.  A URI is its own way.
pub(super) fn relative(directory: &Path, path: &Path) -> PathBuf {
    if is_uri(path) {
        return path.to_owned();
    }
    let path: PathBuf = path.components().collect();
    let shared = directory
        .components()
        .zip(path.components())
        .take_while(|(a, b)| a == b)
        .count();
    let up = directory.components().skip(shared).map(|_| "..");
    let mut way: PathBuf = up.collect();
    way.extend(path.components().skip(shared));
    way
}

/// What the header of an image in the directory `home` says about `image`, found at `absolute` under
/// the name `name`.
pub(super) fn describe(
    name: &OsStr,
    home: &Path,
    absolute: &Path,
    image: &dyn Image,
) -> Result<CreateBacking> {
    let modified = last_change(image, absolute);
    Ok(CreateBacking {
        name: name.to_owned(),
        relative: relative(home, absolute),
        format: image.driver().name,
        identity: image.identity(),
        state: image.state(),
        modified: modified.map_err(|e| Error::io("read its time", e).at(absolute))?,
        virtual_size: image.virtual_size(),
        cluster_size: image.cluster_size(),
        sector_size: image.sector_size(),
        physical_sector_size: image.physical_sector_size(),
        absolute: absolute.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_a_backing_image_goes_up_and_down() {
        for (directory, path, way) in [
            ("/d", "/d/base.vhd", "base.vhd"),
            ("/d/e", "/d/base.vhd", "../base.vhd"),
            ("/d", "/d/e/base.vhd", "e/base.vhd"),
            ("/a/b", "/c/base.vhd", "../../c/base.vhd"),
            ("/", "/base.vhd", "base.vhd"),
        ] {
            let found = relative(Path::new(directory), Path::new(path));
            assert_eq!(found, Path::new(way), "{directory} {path}");
        }
    }
}
