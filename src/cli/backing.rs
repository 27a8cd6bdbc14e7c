//! Paths of the image below a new one.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::formats::qcow2;
use crate::image::Driver;
use crate::image::create::CreateBacking;
use crate::nbd::uri::is_uri;

/// The absolute path of the directory of `file`, without symbolic links.
pub(super) fn directory(file: &Path) -> Result<PathBuf> {
    let parent = match file.parent() {
        // What a server has lies in no directory; names are then as they were typed.
        _ if is_uri(file) => Path::new("."),
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::canonicalize(parent).map_err(|e| Error::io("open the directory", e).at(parent))
}

/// `path` without symbolic links and `..` on the way to its last part, where it leads anywhere.
pub(super) fn clean(path: &Path) -> PathBuf {
    match (path.parent().map(std::fs::canonicalize), path.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    }
}

/// Where the image below a new one is: an absolute path, or an NBD URI as it is.
pub(super) fn locate(home: &Path, name: &str) -> PathBuf {
    match is_uri(Path::new(name)) {
        true => name.into(),
        false => clean(&home.join(name)),
    }
}

/// When the image below was last changed; of one that a server has nobody knows.
pub(super) fn modified(absolute: &Path) -> std::io::Result<SystemTime> {
    match is_uri(absolute) {
        true => Ok(SystemTime::UNIX_EPOCH),
        false => std::fs::metadata(absolute).and_then(|m| m.modified()),
    }
}

/// Refuses a URI as the name of the image below, in formats that know only files.
pub(super) fn refuse_uri(driver: &Driver, name: &str) -> Result<()> {
    match is_uri(Path::new(name)) && driver.name != qcow2::DRIVER.name {
        true => Err(Error::unsupported(format!(
            "images of format '{}' can name only files as their backing image (allowed for NBD \
             URIs: qcow2)",
            driver.name
        ))),
        false => Ok(()),
    }
}

/// Whether both names lead to one file that is there.
pub(super) fn is_same_file(a: &Path, b: &Path) -> bool {
    let identity = |path| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    identity(a).is_some_and(|found| Some(found) == identity(b))
}

/// Refuses to replace an image that the new one is to lie upon.
pub(super) fn refuse_itself(file: &Path, below: &Path) -> Result<()> {
    if is_same_file(file, below) {
        let why = "the new image would replace the backing image or one below it";
        return Err(Error::invalid(why).at(file));
    }
    Ok(())
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

/// What a new image's header says about `chain`, found at `absolute` under the name `name`; `home`
/// is the new image's directory.
pub(super) fn describe(
    name: &str,
    home: &Path,
    absolute: &Path,
    chain: &Chain,
) -> Result<CreateBacking> {
    let modified = modified(absolute);
    Ok(CreateBacking {
        name: name.to_owned(),
        relative: relative(home, absolute),
        format: chain.top().driver().name,
        identity: chain.top().identity(),
        modified: modified.map_err(|e| Error::io("read its time", e).at(absolute))?,
        virtual_size: chain.virtual_size(),
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
