//! Libraries look `getrandom` up by name at run time, so the program's own (`src/nature.rs`) must be visible to the dynamic linker.

fn main() {
    println!("cargo:rustc-link-arg-bins=-Wl,--export-dynamic-symbol=getrandom");
    println!("cargo:rerun-if-changed=build.rs");
}
