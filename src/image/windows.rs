//! Paths as Windows writes them, in images that name others so.

/// A path as Windows writes it, for here: separators translated; of a path with a drive letter, a
/// volume or a server only the file name, which is looked for beside the image.  A path that begins
/// with a slash was written here and is kept.
pub fn from_windows(path: &str) -> Option<String> {
    if path.is_empty() {
        return None;
    }
    if path.starts_with('/') {
        return Some(path.to_owned());
    }
    let path = path.replace('\\', "/");
    let drive = path.as_bytes().get(1) == Some(&b':')
        && path.as_bytes().first().is_some_and(u8::is_ascii_alphabetic);
    if drive || path.starts_with('/') {
        let name = path.rsplit(['/', ':']).next().unwrap_or_default();
        return (!name.is_empty()).then(|| name.to_owned());
    }
    Some(strip_dots(&path))
}

fn strip_dots(path: &str) -> String {
    let mut rest = path;
    while let Some(after) = rest.strip_prefix("./") {
        rest = after.trim_start_matches('/');
    }
    rest.to_owned()
}

/// A relative path as VirtualBox, Hyper-V and XenServer read it: `.\name`; an absolute one as it
/// is, since there is no drive to name.
pub fn to_windows(path: &str) -> String {
    if path.starts_with('/') {
        return path.to_owned();
    }
    let path = path.replace('/', "\\");
    match path == ".." || path.starts_with("..\\") {
        true => path,
        false => format!(".\\{path}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_windows_can_open_leaves_the_file_name() {
        for (path, here) in [
            (r"\\?\Volume{1234-5}\vm\p.vhdx", Some("p.vhdx")),
            (r"\\?\c:\vm\p.vhdx", Some("p.vhdx")),
            (r"\\server\share\p.vhdx", Some("p.vhdx")),
            (r"..\base\p.vhdx", Some("../base/p.vhdx")),
            (r".\p.vhdx", Some("p.vhdx")),
            ("/vm/p.vhdx", Some("/vm/p.vhdx")),
            (r"C:\", None),
            ("", None),
        ] {
            assert_eq!(from_windows(path).as_deref(), here, "{path}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for path in ["p.vhdx", "../a b/p.vhdx", "/abs/p.vhdx", "sub/p.vhdx"] {
            assert_eq!(from_windows(&to_windows(path)).as_deref(), Some(path));
        }
    }
}
