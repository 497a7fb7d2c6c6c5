//! The kernels as they are in the program: their sources, and images where an nvcc was there to compile them.
//!
//! `build.rs` writes the table from the files of `kernels/cuda`. An image holds code for sm_90a and, unless the source
//! is named `*_hopper`, for sm_80 and a form of it that drivers compile for later devices.

mod cache;
#[cfg(test)]
mod tests;

pub(crate) use self::cache::ImageCache;

/// A file of `kernels/cuda`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source {
    /// Without its ending.
    pub(crate) name: &'static str,
    pub(crate) text: &'static str,
    pub(crate) image: Option<&'static [u8]>,
}

include!(concat!(env!("OUT_DIR"), "/images.rs"));

impl Source {
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        SOURCES.iter().find(|source| source.name == name)
    }

    /// Names and texts of the headers that it includes, and of those that these include.
    pub(crate) fn headers(&self) -> Vec<(&'static str, &'static str)> {
        let mut headers: Vec<(&str, &str)> = Vec::new();
        let mut texts = vec![self.text];
        while let Some(text) = texts.pop() {
            for name in text.lines().filter_map(|line| line.strip_prefix("#include \"")?.split('"').next()) {
                let header = HEADERS.iter().find(|header| header.0 == name);
                if let Some(&header) = header.filter(|_| headers.iter().all(|known| known.0 != name)) {
                    headers.push(header);
                    texts.push(header.1);
                }
            }
        }
        headers
    }
}
